"""Checks the rendered manifests against each other and writes one file per object.

    check_manifests.py RENDERED_YAML OUTPUT_DIRECTORY
"""

import pathlib
import sys

import yaml


def only(objects: list[dict], kind: str) -> dict:
    found = [item for item in objects if item["kind"] == kind]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def check_deployment(deployment: dict) -> None:
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    probes = {name: container[name + "Probe"]["grpc"] for name in ("startup", "readiness", "liveness")}
    assert all(probe["port"] == ports["grpc"] for probe in probes.values()), probes
    assert probes["readiness"]["service"] == "nestor.v1.Inference", probes
    assert probes["startup"]["service"] == "nestor.v1.Inference", probes
    assert probes["liveness"]["service"] == "", probes
    resources = container["resources"]
    assert resources["requests"] == resources["limits"], "not of the guaranteed class"
    assert str(resources["limits"]["cpu"]).isdigit(), "CPUs are not whole"
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
    assert pod["securityContext"]["runAsNonRoot"]


def check_selectors(objects: list[dict]) -> None:
    labels = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [service["spec"]["selector"] for service in objects if service["kind"] == "Service"]
    selectors.append(only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
    assert len(selectors) == 3
    for selector in selectors:
        assert selector.items() <= labels.items(), f"{selector} selects no pod with {labels}"


def check_volumes(objects: list[dict]) -> None:
    volumes = only(objects, "Deployment")["spec"]["template"]["spec"]["volumes"]
    named = {volume["name"]: volume for volume in volumes}
    config = only(objects, "ConfigMap")
    # Kustomize appends the content's hash to both.
    assert named["config"]["configMap"]["name"] == config["metadata"]["name"]
    assert list(config["data"]) == ["nestord.yaml"]
    claim = only(objects, "PersistentVolumeClaim")["metadata"]["name"]
    assert named["models"]["persistentVolumeClaim"]["claimName"] == claim


def main() -> int:
    rendered, directory = sys.argv[1], pathlib.Path(sys.argv[2])
    with open(rendered, encoding="utf-8") as file:
        objects = [item for item in yaml.safe_load_all(file) if item]
    check_deployment(only(objects, "Deployment"))
    check_selectors(objects)
    check_volumes(objects)
    directory.mkdir()
    for item in objects:
        path = directory / f"{item['kind']}-{item['metadata']['name']}.yaml"
        path.write_text(yaml.safe_dump(item), encoding="utf-8")
    print(f"{len(objects)} objects")
    return 0


if __name__ == "__main__":
    sys.exit(main())
