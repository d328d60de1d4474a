"""Every metric that the dashboard and the rules use is one that docs/metrics.md lists.

    check_metrics.py METRICS_MD DASHBOARD_JSON RULES_YML...
"""

import json
import re
import sys

NAME = re.compile(r"\bnestor_[a-z0-9_]+")
# A recording rule's name, e.g. job:nestor_tokens:rate5m, is no metric of the daemon.
RECORDED = re.compile(r"\b[a-z_]+:nestor_[a-z0-9_]+(:[a-z0-9_]+)?")
HISTOGRAM_SUFFIX = re.compile(r"_(bucket|sum|count)$")


def listed(metrics_md: str) -> set[str]:
    """Names in docs/metrics.md, with or without the prefix, in backquotes, labels apart."""
    names = set()
    for quoted in re.findall(r"`([a-z0-9_]+)(?:\{[^}`]*\})?`", metrics_md):
        names.add(quoted if quoted.startswith("nestor_") else "nestor_" + quoted)
    return names


def expressions(dashboard: dict) -> list[str]:
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert panels, "the dashboard has no panel"
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(identifiers) == len(set(identifiers)), "panel ids are not unique"
    for panel in panels:
        assert panel["targets"], f"panel {panel['title']!r} has no target"
    variables = [variable["query"]["query"] for variable in dashboard["templating"]["list"]
                 if variable["type"] == "query"]
    return variables + [target["expr"] for panel in panels for target in panel["targets"]]


def used(text: str) -> set[str]:
    return set(NAME.findall(RECORDED.sub("", text)))


def main() -> int:
    metrics_path, dashboard_path, *rule_paths = sys.argv[1:]
    with open(metrics_path, encoding="utf-8") as file:
        known = listed(file.read())
    with open(dashboard_path, encoding="utf-8") as file:
        texts = {dashboard_path: "\n".join(expressions(json.load(file)))}
    for path in rule_paths:
        with open(path, encoding="utf-8") as file:
            # Comments and the names of groups and files are no expressions.
            texts[path] = re.sub(r"#.*|- name: .*|nestor_rules\.yml", "", file.read())
    failures = 0
    for path, text in texts.items():
        names = used(text)
        assert names, f"{path} uses no metric"
        for name in sorted(names):
            if name not in known and HISTOGRAM_SUFFIX.sub("", name) not in known:
                print(f"{path}: {name} is not in {metrics_path}", file=sys.stderr)
                failures += 1
        print(f"{path}: {len(names)} metrics")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
