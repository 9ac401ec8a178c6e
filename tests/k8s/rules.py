"""What must hold in the manifests and no schema says: API server's rules for Jobs, and our own.

Each rule yields what is wrong. The rules for Jobs are those of the API server's validation, as of
Kubernetes 1.34.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import tyro

from tests.k8s.manifests import Object, arguments, named, pods, quantity, variables
from trm_dist.cli import LaunchArguments, RendezvousArguments
from trm_dist.errors import EXIT_PREEMPTED, EXIT_USAGE
from trm_dist.launch.supervisor import STOP_MARGIN_S
from trm_dist.plan import estimate, make_plan

_FIELDS = {
    "status.podIP": "10.0.0.1",
    "metadata.labels['batch.kubernetes.io/controller-uid']": "uid",
}
_SPARE_S = 5
_GPU = "nvidia.com/gpu"
_WORKER_BYTES, _GPU_WORKER_BYTES = 0.6 * 2**30, 4 * 2**30
"""CUDA itself takes more of a process than training does."""
_NODE_BYTES = 0.5 * 2**30
"""Of the supervisor, the zygote and the persister."""


def violations(objects: list[Object]) -> list[str]:
    """Everything that is wrong with the objects of a run."""
    return [message for rule in _RULES for message in rule(objects)]


def launched(objects: list[Object]) -> LaunchArguments:
    """What the supervisor of a trainer is told, by its own parser; SystemExit: an unknown flag."""
    first, *rest = _arguments(objects, named(objects, "Job"))
    assert first == "launch"
    return _parse(tuple(rest))


@cache
def _parse(flags: tuple[str, ...]) -> LaunchArguments:
    return tyro.cli(LaunchArguments, args=flags, config=(tyro.conf.OmitArgPrefixes,))


# -- the API server's ------------------------------------------------------------------------------


def _job_is_one_that_a_server_takes(objects: list[Object]) -> Iterator[str]:
    spec = named(objects, "Job")["spec"]
    indexed = spec.get("completionMode") == "Indexed"
    if indexed and not spec.get("completions"):
        yield "an Indexed Job needs completions"
    for field in ("backoffLimitPerIndex", "maxFailedIndexes", "successPolicy"):
        if field in spec and not indexed:
            yield f"{field} needs an Indexed Job"
    if spec["template"]["spec"].get("restartPolicy") not in {"Never", "OnFailure"}:
        yield "restartPolicy of a Job is Never or OnFailure"


def _numbers_of_the_job_are_ones_that_a_server_takes(objects: list[Object]) -> Iterator[str]:
    spec = named(objects, "Job")["spec"]
    if "maxFailedIndexes" in spec and "backoffLimitPerIndex" not in spec:
        yield "maxFailedIndexes needs backoffLimitPerIndex"
    if spec.get("maxFailedIndexes", 0) > spec["completions"]:
        yield "maxFailedIndexes is more than completions"
    if "successPolicy" in spec and not spec["successPolicy"].get("rules"):
        yield "successPolicy needs a rule"
    for rule in spec.get("successPolicy", {}).get("rules", []):
        if rule.get("succeededCount", 1) > spec["completions"]:
            yield "succeededCount is more than completions"


def _failure_policy_is_one_that_a_server_takes(objects: list[Object]) -> Iterator[str]:
    spec = named(objects, "Job")["spec"]
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    if rules and spec["template"]["spec"].get("restartPolicy") != "Never":
        yield "podFailurePolicy needs restartPolicy Never"
    if rules and spec.get("podReplacementPolicy", "Failed") != "Failed":
        yield "podFailurePolicy needs podReplacementPolicy Failed"
    if len(rules) > 20:
        yield "podFailurePolicy has more than 20 rules"
    for rule in rules:
        if rule["action"] not in {"FailJob", "FailIndex", "Ignore", "Count"}:
            yield f"{rule['action']} is no action"
        if rule["action"] == "FailIndex" and "backoffLimitPerIndex" not in spec:
            yield "FailIndex needs backoffLimitPerIndex"
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            yield "a rule has either onExitCodes or onPodConditions"
        yield from _exit_codes(rule.get("onExitCodes"), spec["template"]["spec"]["containers"])


def _exit_codes(rule: Any, containers: list[Object]) -> Iterator[str]:
    if not rule:
        return
    if rule["operator"] not in {"In", "NotIn"}:
        yield f"{rule['operator']} is no operator"
    if rule["values"] != sorted(set(rule["values"])) or len(rule["values"]) > 255:
        yield "exit codes must be sorted and unique"
    if rule["operator"] == "In" and 0 in rule["values"]:
        yield "exit code 0 is no failure"
    if rule.get("containerName") not in {None, *(each["name"] for each in containers)}:
        yield f"there is no container {rule['containerName']}"


def _budget_is_a_number(objects: list[Object]) -> Iterator[str]:
    budget = named(objects, "PodDisruptionBudget")["spec"]
    if not isinstance(budget.get("minAvailable"), int) or "maxUnavailable" in budget:
        yield "a disruption budget for the pods of a Job needs minAvailable as a number"


# -- what belongs together -------------------------------------------------------------------------


def _names_lead_somewhere(objects: list[Object]) -> Iterator[str]:
    accounts = {each["metadata"]["name"] for each in objects if each["kind"] == "ServiceAccount"}
    namespaces = {each["metadata"].get("namespace") for each in objects} - {None}
    if namespaces != {named(objects, "Namespace")["metadata"]["name"]}:
        yield f"more than one namespace: {namespaces}"
    for name, pod in pods(objects):
        spec = pod["spec"]
        if spec.get("serviceAccountName", "default") not in {"default", *accounts}:
            yield f"{name}: there is no ServiceAccount {spec['serviceAccountName']}"
        (container,) = spec["containers"]
        volumes = {each["name"] for each in spec["volumes"]}
        if volumes != {each["name"] for each in container["volumeMounts"]}:
            yield f"{name}: volumes and mounts differ"


def _selectors_find_pods(objects: list[Object]) -> Iterator[str]:
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(objects)}
    for each in objects:
        spec, name = each.get("spec", {}), each["metadata"]["name"]
        wanted = {"Service": spec.get("selector")}.get(each["kind"])
        if each["kind"] in {"PodDisruptionBudget", "Deployment"}:
            wanted = spec["selector"]["matchLabels"]
        if wanted is None:
            continue
        found = [owner for owner, those in labels.items() if wanted.items() <= those.items()]
        expected = {"Deployment": name, "PodDisruptionBudget": "trm"}.get(each["kind"], name)
        if found != [expected]:
            yield f"{each['kind']} {name} selects {found}"
    (policy,) = (each["spec"] for each in objects if each["kind"] == "NetworkPolicy")
    ours = policy["podSelector"].get("matchLabels", {}).items()
    if left_out := [name for name, those in labels.items() if not ours <= those.items()]:
        yield f"the NetworkPolicy leaves out {left_out}"


def _ports_are_listened_on(objects: list[Object]) -> Iterator[str]:
    launch, meeting = launched(objects), _meeting(objects)
    listening = {
        "trm": {launch.launch.health_port, launch.config.log.metrics_port},
        "trm-rendezvous": {meeting.port},
    }
    for name, pod in pods(objects):
        (container,) = pod["spec"]["containers"]
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        if set(ports.values()) != listening.get(name, set(ports.values())):
            yield f"{name} declares ports {ports} and listens on {listening[name]}"
        for probe in ("readinessProbe", "livenessProbe"):
            (check,) = (each for each in container[probe].values() if isinstance(each, dict))
            if check["port"] not in ports:
                yield f"{name}: the {probe} asks port {check['port']}"
            if check.get("path", "/healthz") != "/healthz":
                yield f"{name}: nothing answers at {check['path']}"


def _services_lead_to_ports(objects: list[Object]) -> Iterator[str]:
    owners = dict(pods(objects))
    for each in objects:
        if each["kind"] == "Service":
            (container,) = owners[each["metadata"]["name"]]["spec"]["containers"]
            ports = {port["name"] for port in container["ports"]}
            if not {port["targetPort"] for port in each["spec"]["ports"]} <= ports:
                yield f"Service {each['metadata']['name']} has a target that is no port"


def _nodes_meet_at_the_rendezvous(objects: list[Object]) -> Iterator[str]:
    service = named(objects, "Service", "trm-rendezvous")
    (port,) = service["spec"]["ports"]
    expected = f"{service['metadata']['name']}:{port['port']}"
    if launched(objects).launch.rdzv_endpoint != expected:
        yield f"--rdzv-endpoint is not {expected}"
    if not launched(objects).launch.local_addr:
        yield "--local-addr is missing: the names of pods are not known to each other"


def _sizes_fit(objects: list[Object]) -> Iterator[str]:
    spec = named(objects, "Job")["spec"]
    least, most = launched(objects).launch.nodes()
    if spec["completions"] != spec["parallelism"]:
        yield "completions and parallelism differ"
    if not least <= spec["completions"] <= most:
        yield f"{spec['completions']} pods do not fit --nnodes {least}:{most}"
    if spec["maxFailedIndexes"] != spec["completions"] - least:
        yield "maxFailedIndexes is not the number of pods that training can do without"
    if named(objects, "PodDisruptionBudget")["spec"]["minAvailable"] != least:
        yield "minAvailable is not the least number of --nnodes"


def _exit_codes_are_ours(objects: list[Object]) -> Iterator[str]:
    policy = named(objects, "Job")["spec"]["podFailurePolicy"]["rules"]
    if "onPodConditions" not in policy[0]:
        yield "disruptions must be looked for first"
    acted = {
        code: rule["action"]
        for rule in policy
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    if acted != {EXIT_USAGE: "FailJob", EXIT_PREEMPTED: "Ignore"}:
        yield f"exit codes are taken for {acted}"


def _grace_periods_add_up(objects: list[Object]) -> Iterator[str]:
    grace_s = launched(objects).config.checkpoint.grace_period
    given_s = named(objects, "Job")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    least_s = grace_s + STOP_MARGIN_S + (_SPARE_S if grace_s > 10 else 2)
    if given_s < least_s:
        yield f"terminationGracePeriodSeconds {given_s} is less than {least_s}"


def _memory_suffices(objects: list[Object]) -> Iterator[str]:
    parsed, spec = launched(objects), named(objects, "Job")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    shm = next(each["emptyDir"] for each in spec["volumes"] if each["name"] == "shm")
    if shm.get("medium") != "Memory":
        yield "/dev/shm is no memory"
    shm_bytes = quantity(shm["sizeLimit"])
    slots = parsed.config.checkpoint.snapshot_slots * _checkpoint_bytes(parsed)
    if shm_bytes < 2 * slots:
        yield f"/dev/shm has not twice the {slots / 2**20:.0f} MiB of the snapshots"
    worker_bytes = _GPU_WORKER_BYTES if _num_gpus(container) else _WORKER_BYTES
    needed = shm_bytes + parsed.launch.nproc_per_node * worker_bytes + _NODE_BYTES
    if quantity(container["resources"]["limits"]["memory"]) < needed:
        yield f"the memory limit is less than {needed / 2**20:.0f} MiB"


def _each_worker_has_what_computes(objects: list[Object]) -> Iterator[str]:
    parsed, spec = launched(objects), named(objects, "Job")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    resources, workers = container["resources"], parsed.launch.nproc_per_node
    gpus = _num_gpus(container)
    if gpus not in {0, workers}:
        yield f"{workers} workers have {gpus} GPUs"
    if parsed.config.train.device != ("cuda" if gpus else "cpu"):
        yield f"--device {parsed.config.train.device} with {gpus} GPUs"
    if int(resources["requests"].get(_GPU, gpus)) != gpus:
        yield "a server takes no other request for GPUs than their limit"
    if quantity(resources["limits"]["cpu"]) < workers:
        yield f"{workers} workers have {resources['limits']['cpu']} cores"
    tolerated = [each for each in spec["tolerations"] if each["key"] == _GPU]
    if tolerated != [{"key": _GPU, "operator": "Exists", "effect": "NoSchedule"}] * bool(gpus):
        yield f"{gpus} GPUs, and taints of nodes with GPUs are tolerated by {tolerated}"
    set_here = {each["name"] for each in container["env"]}
    if "NVIDIA_VISIBLE_DEVICES" in set_here:
        yield "NVIDIA_VISIBLE_DEVICES would give a pod the GPUs of others"


def _num_gpus(container: Object) -> int:
    return int(container["resources"]["limits"].get(_GPU, 0))


def _workers_reach_each_other(objects: list[Object]) -> Iterator[str]:
    """On any port: gloo and NCCL choose theirs as they start."""
    ingress = named(objects, "NetworkPolicy")["spec"]["ingress"]
    labels = dict(pods(objects))["trm"]["metadata"]["labels"].items()
    among = [
        peer["podSelector"].get("matchLabels", {}).items()
        for rule in ingress
        if "ports" not in rule
        for peer in rule.get("from", [])
        if set(peer) == {"podSelector"}
    ]
    if not any(ours and ours <= labels for ours in among):
        yield "the NetworkPolicy does not let workers reach each other on any port"
    if any("ports" not in rule and "from" not in rule for rule in ingress):
        yield "the NetworkPolicy lets anyone in"


def _writes_go_to_volumes(objects: list[Object]) -> Iterator[str]:
    for name, pod in pods(objects):
        (container,) = pod["spec"]["containers"]
        mounts = {each["mountPath"] for each in container["volumeMounts"]}
        if not container["securityContext"]["readOnlyRootFilesystem"]:
            yield f"{name}: the root file system can be written"
        if "/tmp" not in mounts:
            yield f"{name}: there is no /tmp"
    job = named(objects, "Job")["spec"]["template"]["spec"]["containers"][0]
    mounts = {each["mountPath"] for each in job["volumeMounts"]}
    config = launched(objects).config
    if not {config.data.cache_dir, config.checkpoint.snapshot_dir} <= mounts:
        yield "--cache-dir or --snapshot-dir is no volume"
    home = next((each["value"] for each in job["env"] if each["name"] == "HOME"), "")
    if home not in mounts and config.train.device == "cuda":
        yield "HOME is no volume, and CUDA keeps there what it compiles"


def _requests_are_limits(objects: list[Object]) -> Iterator[str]:
    resources = named(objects, "Job")["spec"]["template"]["spec"]["containers"][0]["resources"]
    if resources["requests"]["memory"] != resources["limits"]["memory"]:
        yield "a trainer may be killed for the memory of others"


def _images_are_one(objects: list[Object]) -> Iterator[str]:
    images = {pod["spec"]["containers"][0]["image"] for name, pod in pods(objects) if name != "s3"}
    if len(images) != 1:
        yield f"trainer and rendezvous are of several images: {images}"


def _variables_are_used(objects: list[Object]) -> Iterator[str]:
    data = named(objects, "ConfigMap")["data"]
    text = " ".join(named(objects, "Job")["spec"]["template"]["spec"]["containers"][0]["args"])
    for name in data:
        if f"$({name})" not in text and not name.startswith("AWS_"):
            yield f"nothing uses {name}"


_RULES = [
    _job_is_one_that_a_server_takes,
    _numbers_of_the_job_are_ones_that_a_server_takes,
    _failure_policy_is_one_that_a_server_takes,
    _budget_is_a_number,
    _names_lead_somewhere,
    _selectors_find_pods,
    _ports_are_listened_on,
    _services_lead_to_ports,
    _nodes_meet_at_the_rendezvous,
    _sizes_fit,
    _exit_codes_are_ours,
    _grace_periods_add_up,
    _memory_suffices,
    _each_worker_has_what_computes,
    _workers_reach_each_other,
    _writes_go_to_volumes,
    _requests_are_limits,
    _images_are_one,
    _variables_are_used,
]


def _arguments(objects: list[Object], owner: Object) -> list[str]:
    (container,) = owner["spec"]["template"]["spec"]["containers"]
    return arguments(container, variables(container, objects, _FIELDS))


def _meeting(objects: list[Object]) -> RendezvousArguments:
    first, *rest = _arguments(objects, named(objects, "Deployment", "trm-rendezvous"))
    assert first == "rendezvous"
    return tyro.cli(RendezvousArguments, args=rest)


@cache
def _checkpoint_bytes(parsed: LaunchArguments) -> int:
    """What `trm_dist check` prints, for an empty directory, as neither bucket nor GPU is here."""
    here = {"checkpoint_dir": "/nonexistent", "cache_dir": "none", "device": "cpu"}
    config = parsed.config.with_values(here)
    return estimate(make_plan(config, {"dataset"}, ""))["checkpoint_bytes"]
