"""The container's configuration against the reference file and against what surrounds it.

    check_configuration.py REFERENCE_YAML CONTAINER_YAML DEPLOYMENT_YAML DOCKERFILE
"""

import re
import sys

import yaml

# Where a container needs another value than the default.
MAY_DIFFER = {"model.directory", "server.max_connection_age_ms", "server.drain_grace_ms"}


def flat(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        groups = yaml.safe_load(file)
    return {f"{group}.{key}": value for group, keys in groups.items() for key, value in keys.items()}


def check_keys(reference: dict, container: dict) -> None:
    assert len(reference) > 10, "the reference has too few keys"
    assert list(reference) == list(container), (
        f"keys differ: {sorted(set(reference) ^ set(container))}, or their order does")
    for key, value in reference.items():
        if key not in MAY_DIFFER:
            assert container[key] == value, f"{key}: {container[key]} is not the default {value}"
        else:
            assert container[key] != value, f"{key} is said to differ but does not"


def port(listen: str) -> int:
    address, number = listen.rsplit(":", 1)
    assert address == "0.0.0.0", f"{listen} is not reachable from outside the container"
    return int(number)


def main() -> int:
    reference_path, container_path, deployment_path, dockerfile_path = sys.argv[1:]
    reference, container = flat(reference_path), flat(container_path)
    check_keys(reference, container)

    with open(deployment_path, encoding="utf-8") as file:
        pod = yaml.safe_load(file)["spec"]["template"]
    drain_seconds = (container["server.drain_grace_ms"] + container["server.drain_limit_ms"]) / 1000
    grace_seconds = pod["spec"]["terminationGracePeriodSeconds"]
    assert grace_seconds > drain_seconds, f"{grace_seconds} s to end, {drain_seconds} s to drain"

    (daemon,) = pod["spec"]["containers"]
    ports = {entry["name"]: entry["containerPort"] for entry in daemon["ports"]}
    listening = {"grpc": port(container["server.listen"]),
                 "metrics": port(container["metrics.listen"])}
    assert ports == listening, f"the pod names {ports}, nestord listens on {listening}"
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(listening["metrics"])
    with open(dockerfile_path, encoding="utf-8") as file:
        exposed = re.search(r"^EXPOSE (.*)$", file.read(), re.MULTILINE).group(1).split()
    assert sorted(exposed) == sorted(str(number) for number in listening.values()), exposed
    print(f"{len(container)} keys, {sum(container[k] != reference[k] for k in reference)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
