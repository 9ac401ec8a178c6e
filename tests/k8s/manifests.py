"""The manifests as data: what kubectl would send, and what a kubelet would make of it."""

import re
import subprocess
import sysconfig
from base64 import b64decode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).parents[2] / "k8s"
JOB = K8S / "job.yaml"
OVERLAYS = sorted(each.name for each in (K8S / "overlays").iterdir())
KUBECTL = Path(sysconfig.get_path("scripts")) / "kubectl"

Object = dict[str, Any]

_UNITS = {"m": 1e-3, "": 1.0, "Mi": 2.0**20, "Gi": 2.0**30}


def read_job() -> list[Object]:
    """The objects of job.yaml."""
    return list(yaml.safe_load_all(JOB.read_text()))


def build(directory: Path) -> list[Object]:
    """The objects of a kustomization, as kubectl makes them."""
    command = [str(KUBECTL), "kustomize", str(directory)]
    built = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60)
    return list(yaml.safe_load_all(built.stdout))


def named(objects: list[Object], kind: str, name: str = "") -> Object:
    """The only object of a kind, or the one of this name."""
    (found,) = (
        each
        for each in objects
        if each["kind"] == kind and name in {"", each["metadata"]["name"]}
    )  # fmt: skip
    return found


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """The name of each workload, and its pod template."""
    for each in objects:
        if each["kind"] in {"Job", "Deployment"}:
            yield each["metadata"]["name"], each["spec"]["template"]


def variables(
    container: Object, objects: list[Object], fields: Mapping[str, str]
) -> dict[str, str]:
    """The environment of a container.

    Args:
        container: Of a pod.
        objects: Where the ConfigMaps and Secrets are that it refers to.
        fields: What stands in the fields of the pod that it refers to.
    """
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= named(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
        else:
            secret = named(objects, "Secret", source["secretRef"]["name"])
            found |= {name: b64decode(text).decode() for name, text in secret["data"].items()}
    for each in container.get("env", []):
        path = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        found[each["name"]] = fields[path] if path else each["value"]
    return found


def arguments(container: Object, environment: Mapping[str, str]) -> list[str]:
    """The arguments of a container with its variables in place; KeyError: there is none."""
    return [
        re.sub(r"\$\(([A-Z0-9_]+)\)", lambda match: environment[match[1]], each)
        for each in container.get("args", [])
    ]


def quantity(text: str | int) -> float:
    """A quantity of Kubernetes in bytes or cores."""
    number, unit = re.fullmatch(r"([0-9.]+)(\D*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * _UNITS[unit]
