"""Manifests as data: schemas of three versions, the rules that schemas miss, each seen to bite."""

import os
import textwrap
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.k8s.manifests import K8S, OVERLAYS, Object, build, named, pods, read_job
from tests.k8s.rules import violations

VERSIONS = ["1.31", "1.34", "1.37"]


@pytest.fixture(scope="module")
def built() -> dict[str, list[Object]]:
    return {"job.yaml": read_job()} | {each: build(K8S / "overlays" / each) for each in OVERLAYS}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["job.yaml", *OVERLAYS])
def test_schemas_hold(built: dict[str, list[Object]], name: str, version: str) -> None:
    for each in built[name]:
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("name", ["job.yaml", *OVERLAYS])
def test_rules_hold(built: dict[str, list[Object]], name: str) -> None:
    assert violations(built[name]) == []


def test_overlays_change_what_they_are_for(built: dict[str, list[Object]]) -> None:
    def grace_s(name: str) -> int:
        pod = named(built[name], "Job")["spec"]["template"]["spec"]
        return int(pod["terminationGracePeriodSeconds"])

    assert grace_s("eks") < 120
    assert grace_s("gke") <= 15
    assert grace_s("aks") < 30


def test_kustomization_of_the_readme_is_a_whole_run(tmp_path: Path) -> None:
    readme = (K8S.parent / "README.md").read_text()
    block = "    # " + readme.split("    # kustomization.yaml beside", 1)[1].split("\n\n", 1)[0]
    there = textwrap.dedent(block).replace("trm_dist/k8s", os.path.relpath(K8S, tmp_path))
    (tmp_path / "kustomization.yaml").write_text(there)

    objects = build(tmp_path)

    data = named(objects, "ConfigMap")["data"]
    assert data["CHECKPOINT_DIR"] == "s3://BUCKET/RUN"
    assert data["DATASET"] == "s3://BUCKET/data.jsonl"
    data["DATASET"] = "sudoku4:train?count=400"  # one that can be read here
    assert violations(objects) == []
    images = {pod["spec"]["containers"][0]["image"] for _, pod in pods(objects)}
    assert images == {"REGISTRY/trm_dist@sha256:..."}
    (account,) = (each for each in objects if each["kind"] == "ServiceAccount")
    assert "arn:aws:iam::ACCOUNT:role/ROLE" in account["metadata"]["annotations"].values()


@pytest.mark.parametrize("cloud", ["eks", "gke", "aks"])
def test_gpus_are_had_on_any_cloud(
    tmp_path: Path, built: dict[str, list[Object]], cloud: str
) -> None:
    k8s = os.path.relpath(K8S, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [{k8s}/overlays/{cloud}]\ncomponents: [{k8s}/gpu]\n"
    )

    objects = build(tmp_path)

    assert violations(objects) == []
    for each in objects:
        kubernetes_validate.validate(each, VERSIONS[-1], strict=True)
    pod, before = (
        named(those, "Job")["spec"]["template"]["spec"] for those in (objects, built[cloud])
    )
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["tolerations"][:-1] == before["tolerations"]
    for kept in ("nodeSelector", "terminationGracePeriodSeconds", "securityContext"):
        assert pod[kept] == before[kept]
    data, before = (named(those, "ConfigMap")["data"] for those in (objects, built[cloud]))
    assert data == before | {"WORKERS": "1", "DEVICE": "cuda"}


def test_namespace_of_a_second_run_holds_all_of_it(tmp_path: Path) -> None:
    base = os.path.relpath(K8S / "base", tmp_path)
    (tmp_path / "kustomization.yaml").write_text(f"namespace: run-two\nresources: [{base}]\n")

    objects = build(tmp_path)

    assert violations(objects) == []
    assert named(objects, "Namespace")["metadata"]["name"] == "run-two"


# -- each rule bites -------------------------------------------------------------------------------

Job = dict[str, Any]


def _job(change: Callable[[Job], object]) -> Callable[[list[Object]], object]:
    return lambda objects: change(named(objects, "Job")["spec"])


def _trainer(change: Callable[[Job], object]) -> Callable[[list[Object]], object]:
    return _job(lambda spec: change(spec["template"]["spec"]["containers"][0]))


def _argument(old: str, new: str) -> Callable[[list[Object]], object]:
    def change(container: Job) -> None:
        container["args"] = [each.replace(old, new) for each in container["args"]]

    return _trainer(change)


def _policy(number: int, **values: Any) -> Callable[[list[Object]], object]:
    return _job(lambda spec: spec["podFailurePolicy"]["rules"][number].update(values))


def _codes(number: int, **values: Any) -> Callable[[list[Object]], object]:
    def change(spec: Job) -> None:
        spec["podFailurePolicy"]["rules"][number]["onExitCodes"].update(values)

    return _job(change)


def _data(**values: str) -> Callable[[list[Object]], object]:
    return lambda objects: named(objects, "ConfigMap")["data"].update(values)


BROKEN: dict[str, tuple[Callable[[list[Object]], object], str]] = {
    "no index": (_job(lambda spec: spec.pop("completionMode")), "needs an Indexed Job"),
    "no budget": (_job(lambda spec: spec.pop("backoffLimitPerIndex")), "backoffLimitPerIndex"),
    "failures": (_job(lambda spec: spec.update(maxFailedIndexes=9)), "more than completions"),
    "success": (_job(lambda spec: spec["successPolicy"]["rules"][0].update(succeededCount=9)),
                "succeededCount is more"),
    "restart": (_job(lambda spec: spec["template"]["spec"].update(restartPolicy="OnFailure")),
                "needs restartPolicy Never"),
    "replacement": (_job(lambda spec: spec.update(podReplacementPolicy="TerminatingOrFailed")),
                    "needs podReplacementPolicy Failed"),
    "action": (_policy(0, action="Ignored"), "is no action"),
    "both": (_policy(1, onPodConditions=[]), "either onExitCodes"),
    "unsorted": (_codes(2, values=[2, 1]), "sorted and unique"),
    "zero": (_codes(2, values=[0, 1]), "is no failure"),
    "container": (_codes(2, containerName="train"), "there is no container train"),
    "codes": (_codes(1, values=[42]), "exit codes are taken for"),
    "order": (_job(lambda spec: spec["podFailurePolicy"]["rules"].reverse()), "looked for first"),
    "percent": (lambda objects: named(objects, "PodDisruptionBudget")["spec"].update(
        minAvailable="50%"), "minAvailable as a number"),
    "account": (_job(lambda spec: spec["template"]["spec"].update(serviceAccountName="x")),
                "no ServiceAccount x"),
    "volume": (_trainer(lambda each: each["volumeMounts"].pop()), "volumes and mounts differ"),
    "labels": (_job(lambda spec: spec["template"]["metadata"]["labels"].clear()), "selects []"),
    "policy": (lambda objects: named(objects, "NetworkPolicy")["spec"]["podSelector"].update(
        matchLabels={"a": "b"}), "leaves out"),
    "health": (_argument("--health-port=8080", "--health-port=8081"), "and listens on"),
    "probe": (_trainer(lambda each: each["livenessProbe"]["httpGet"].update(path="/readyz")),
              "nothing answers"),
    "service": (lambda objects: named(objects, "Service")["spec"]["ports"][0].update(
        targetPort="x"), "no port"),
    "endpoint": (_argument("trm-rendezvous:29500", "trm-rendezvous:29400"), "--rdzv-endpoint is"),
    "size": (_job(lambda spec: spec.update(parallelism=5)), "differ"),
    "nodes": (_data(NODES="2:3"), "do not fit --nnodes"),
    "grace": (_data(GRACE_PERIOD="36"), "is less than"),
    "shm": (_job(lambda spec: spec["template"]["spec"]["volumes"][0]["emptyDir"].update(
        sizeLimit="20Mi")), "has not twice"),
    "disk": (_job(lambda spec: spec["template"]["spec"]["volumes"][0]["emptyDir"].pop("medium")),
             "is no memory"),
    "memory": (_data(WORKERS="3"), "memory limit is less"),
    "cores": (_data(WORKERS="3"), "3 workers have 2 cores"),
    "taint": (_job(lambda spec: spec["template"]["spec"]["tolerations"].append(
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})),
        "0 GPUs, and taints"),
    "device": (_data(DEVICE="auto"), "--device auto with 0 GPUs"),
    "ports": (lambda objects: named(objects, "NetworkPolicy")["spec"]["ingress"][0].update(
        ports=[{"port": 29500}]), "does not let workers reach"),
    "anyone": (lambda objects: named(objects, "NetworkPolicy")["spec"]["ingress"][1].clear(),
               "lets anyone in"),
    "cache": (_argument("--cache-dir=/cache", "--cache-dir=/var/cache"), "is no volume"),
    "root": (_trainer(lambda each: each["securityContext"].update(readOnlyRootFilesystem=False)),
             "can be written"),
    "request": (_trainer(lambda each: each["resources"]["requests"].update(memory="1Gi")),
                "memory of others"),
    "image": (_trainer(lambda each: each.update(image="other")), "several images"),
    "unused": (_data(EPOCHS="3"), "nothing uses EPOCHS"),
}  # fmt: skip


def _limits(**values: str | int) -> Callable[[list[Object]], object]:
    return _trainer(lambda each: each["resources"]["limits"].update(values))


def _environment(old: str, new: str) -> Callable[[list[Object]], object]:
    def change(container: Job) -> None:
        next(each for each in container["env"] if each["name"] == old)["name"] = new

    return _trainer(change)


BROKEN_WITH_GPUS: dict[str, tuple[Callable[[list[Object]], object], str]] = {
    "more workers": (_data(WORKERS="2"), "2 workers have 1 GPUs"),
    "more GPUs": (_limits(**{"nvidia.com/gpu": 2}), "1 workers have 2 GPUs"),
    "other request": (_limits(**{"nvidia.com/gpu": 2}), "no other request for GPUs"),
    "processor": (_data(DEVICE="auto"), "--device auto with 1 GPUs"),
    "memory of CUDA": (_limits(memory="4Gi"), "memory limit is less than 5632 MiB"),
    "taint": (_job(lambda spec: spec["template"]["spec"]["tolerations"].pop()),
              "1 GPUs, and taints"),
    "all GPUs": (_environment("NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_VISIBLE_DEVICES"),
                 "the GPUs of others"),
    "home": (_environment("HOME", "OTHER"), "HOME is no volume"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("manifest", "name"),
    [*(("job.yaml", each) for each in BROKEN), *(("gpu", each) for each in BROKEN_WITH_GPUS)],
)
def test_rule_bites(built: dict[str, list[Object]], manifest: str, name: str) -> None:
    change, message = (BROKEN_WITH_GPUS if manifest == "gpu" else BROKEN)[name]
    objects = deepcopy(built[manifest])

    change(objects)

    assert message in "; ".join(violations(objects))


def test_flag_that_the_trainer_does_not_have_is_found(built: dict[str, list[Object]]) -> None:
    objects = deepcopy(built["job.yaml"])
    _trainer(lambda each: each["args"].append("--batchsize=3"))(objects)

    with pytest.raises(SystemExit):
        violations(objects)


def test_variable_that_nobody_sets_is_found(built: dict[str, list[Object]]) -> None:
    objects = deepcopy(built["job.yaml"])
    _trainer(lambda each: each["args"].append("--epochs=$(EPOCHS)"))(objects)

    with pytest.raises(KeyError, match="EPOCHS"):
        violations(objects)
