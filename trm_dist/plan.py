"""Everything that can be known before training: where to start, with which settings, on which data.

All user errors appear here, before any process group exists. The writer makes the plan; the others
receive its settings and make their part of it, so that all workers are of one mind.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, Self

import torch

from trm_dist.checkpoint.names import is_checkpoint_name
from trm_dist.checkpoint.resume import Remembered, Start, choose_start
from trm_dist.checkpoint.runs import Run
from trm_dist.checkpoint.store import Store, open_store, split_url
from trm_dist.config import Config, DataConfig, Settings, check_sizes, derived_sizes, resolve
from trm_dist.data.cache import Cache, default_directory
from trm_dist.data.dataset import Dataset, open_dataset, preload
from trm_dist.elastic.device import check_compiler, compiler_name, device_name
from trm_dist.errors import ConfigError, DataError, ResumeError, StoreAwayError, is_away
from trm_dist.model.optim import VARIANTS
from trm_dist.model.trm import Shape, Trm, num_parameters
from trm_dist.observe import curves

logger = logging.getLogger(__name__)

_OPTIMIZER_SHARE = 2
"""AdamW keeps two numbers for each weight."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is going to do."""

    settings: Settings
    start: Start
    dataset: Dataset
    eval_dataset: Dataset | None
    shape: Shape
    restore_s: float = 0.0
    """What finding and reading the state has taken."""

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self.settings.config

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch; the last one may be smaller."""
        return -(-self.dataset.num_samples // self.config.data.batch_size)

    @property
    def total_batches(self) -> int:
        """Batches of the whole run."""
        return self.batches_per_epoch * self.config.train.epochs

    def as_run(self, run: Run) -> Self:
        """Return the plan of the run that was claimed for it."""
        return replace(self, start=replace(self.start, run=run))

    def without_state(self) -> Self:
        """Return the plan without the state, once it is taken over."""
        return replace(self, start=replace(self.start, state=None))


def make_plan(
    config: Config, given: Iterable[str], launch_id: str, memory: Iterable[Remembered] = (),
    *, is_again: bool = False,
) -> Plan:  # fmt: skip
    """Make the writer's plan; nothing is written.

    Args:
        config: What the command line said, defaults included.
        given: Names of the settings that were really given.
        launch_id: Names this launch over the restarts of its workers.
        memory: Snapshots that dead workers have left on this node.
        is_again: Whether this launch has started workers before.

    Raises:
        UserError: Something must be changed first; one message says what.
    """
    store = open_store(config.checkpoint.checkpoint_dir)
    if store.url.startswith("memory:"):
        raise ConfigError(
            f"--checkpoint-dir {store.url}: what is kept there is gone with the process. Give a "
            "path, s3://BUCKET/RUN, or another URL that lasts."
        )
    started_s = time.monotonic()
    start = _choose_start(store, config, launch_id, memory, is_again=is_again)
    restore_s = time.monotonic() - started_s
    return replace(plan_from(start, config, given), restore_s=restore_s)


def plan_from(start: Start, config: Config, given: Iterable[str]) -> Plan:
    """Make the plan that goes on from a start.

    Raises:
        UserError: Something must be changed first; one message says what.
    """
    settings = resolve(config, given, start.state["config"] if start.state else None)
    _check_save(settings.config.checkpoint.save)
    plan = _with_data(settings, start)
    if start.state is not None:
        _check_dataset(plan, start.state["dataset"])
        _tell_differences(start.state["run"]["environment"], environment(plan.config))
    return plan


def to_message(plan: Plan) -> bytes:
    """Return what the other workers need of the writer's plan, besides the state."""
    message = {
        "values": plan.config.flat(),
        "origins": dict(plan.settings.origins),
        "run": asdict(plan.start.run),
        "source": plan.start.source,
        "sha256": [each.sha256 + each.puzzles_sha256 for each in _datasets(plan)],
    }
    return json.dumps(message).encode()


def from_message(message: bytes, state: dict[str, Any] | None, config: Config) -> Plan:
    """Make the plan that the writer sent.

    Args:
        message: From `to_message`.
        state: To go on from; None on a fresh start.
        config: What the command line of this worker said; what it computes on is its own affair.

    Raises:
        DataError: This node's data are not the writer's.
        StoreAwayError: They cannot be reached from this node.
    """
    sent: dict[str, Any] = json.loads(message)
    values = sent["values"] | {"device": config.train.device}
    settings = Settings(Config().with_values(values), sent["origins"])
    try:
        plan = _with_data(settings, Start(Run(**sent["run"]), sent["source"], state))
    except DataError as error:
        if is_away(error):
            raise StoreAwayError(str(error)) from error
        raise
    for each, expected in zip(_datasets(plan), sent["sha256"], strict=True):
        if each.sha256 + each.puzzles_sha256 != expected:
            raise DataError(
                f"{each.url} on this node is not the file that the first worker reads (sha256 "
                f"{each.sha256[:12]} instead of {expected[:12]}). Put the same file on every node."
            )
    return plan


def environment(config: Config) -> dict[str, str]:
    """Return what the last bits of a result may depend on besides code, data and settings."""
    return {
        "torch": torch.__version__,
        "device": device_name(config.train.device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(config.train.threads),
        "optimizer": VARIANTS[config.train.optim],
    } | ({"compiler": compiler_name(config.train.device)} if config.train.compile else {})


def estimate(plan: Plan) -> dict[str, int]:
    """Return parameters, bytes of a checkpoint, and bytes of all that will be kept."""
    with torch.device("meta"):
        module = Trm(plan.shape, seed=0)
    count = num_parameters(module)
    num_vectors = plan.shape.num_puzzles * plan.shape.puzzle_emb_ndim
    checkpoint = ((2 + _OPTIMIZER_SHARE) * count + num_vectors) * 4
    checkpoint += curves.NUM_BYTES if plan.config.log.tensorboard else 0
    own_names = plan.total_batches // plan.config.checkpoint.checkpoint_interval
    if plan.config.checkpoint.keep_last:
        own_names = min(own_names, plan.config.checkpoint.keep_last + 1)
    return {
        "parameters": count,
        "checkpoint_bytes": checkpoint,
        "kept_bytes": (own_names + 2) * checkpoint,
    }


def check_space(plan: Plan, store: Store) -> None:
    """Warn when what will be kept does not fit into the free space."""
    needed, free = estimate(plan)["kept_bytes"], store.free_bytes()
    if free is not None and needed > free:
        logger.warning(
            "the checkpoints of this run will take about %.1f GiB and %s has %.1f GiB free; keep "
            "fewer with --keep-last N or a larger --checkpoint-interval",
            needed / 2**30,
            store.url,
            free / 2**30,
        )


def check_writable(store: Store) -> None:
    """Check that checkpoints could be written, leaving nothing behind.

    Raises:
        ConfigError: They could not.
    """
    try:
        store.check_writable()
    except OSError as error:
        raise ConfigError(
            f"--checkpoint-dir {store.url} cannot be written: {error}. Mend that or choose another."
        ) from error


def _check_save(url: str) -> None:
    """Check before training what is written after it.

    Raises:
        ConfigError: `--save` names a place that cannot be written or that is a checkpoint's.
    """
    if not url:
        return
    directory, name = split_url(url)
    if not name or is_checkpoint_name(name):
        raise ConfigError(
            f"--save {url}: the final model needs a file name of its own, not that of a checkpoint."
        )
    try:
        open_store(directory).check_writable()
    except OSError as error:
        raise ConfigError(f"--save {url} cannot be written: {error}. Choose another.") from error


def _choose_start(
    store: Store, config: Config, launch_id: str, memory: Iterable[Remembered], *, is_again: bool
) -> Start:
    try:
        # A launch that asks for another start is another launch, whatever its id.
        asked = blake2b(config.checkpoint.resume.encode(), digest_size=4).hexdigest()
        named = f"{launch_id} {asked}"
        return choose_start(store, config.checkpoint, named, memory, is_again=is_again)
    except OSError as error:
        raise ResumeError(
            f"--checkpoint-dir {store.url} cannot be read: {error}. Mend that or choose another."
        ) from error


def _with_data(settings: Settings, start: Start) -> Plan:
    data = settings.config.data
    if not data.dataset:
        raise ConfigError(
            "--dataset is missing. Give a JSON or JSONL file of records, or sudoku4:train."
        )
    seq_len = settings.config.model.seq_len
    cache = cache_of(data)
    dataset = open_dataset(
        data.dataset, seq_len=seq_len, overlong=data.overlong, cache=cache, augment=data.augment
    )
    settings = settings.with_derived(**derived_sizes(settings.config, seq_len=dataset.seq_len))
    config = settings.config
    check_sizes(config.model)
    if config.train.compile:
        check_compiler(config.train.device, config.train.cpu_capability)
    if dataset.num_samples < data.batch_size:
        raise DataError(
            f"--batch-size {data.batch_size} is larger than the data: {data.dataset} has "
            f"{dataset.num_samples} sample(s). Use a smaller batch."
        )
    eval_dataset = None
    if data.eval_dataset:
        eval_dataset = open_dataset(
            data.eval_dataset, seq_len=dataset.seq_len, overlong=data.overlong, cache=cache
        )
        if eval_dataset.codec != dataset.codec:
            raise DataError(
                f"--eval-dataset {data.eval_dataset} ({eval_dataset.codec}) is not of the kind of "
                f"--dataset {data.dataset} ({dataset.codec})."
            )
        check_puzzles(config, eval_dataset, dataset.num_puzzles)
    shape = shape_of(config, dataset.num_tokens, dataset.num_puzzles)
    return Plan(settings, start, dataset, eval_dataset, shape)


def cache_of(data: DataConfig) -> Cache | None:
    """Return where this node keeps encoded data; None: nowhere."""
    if data.cache_dir == "none":
        return None
    return Cache(data.cache_dir or default_directory(), int(data.cache_gb * 1e9))


def preload_data(config: Config) -> None:
    """Open the data that the flags name before they are needed; see `preload`."""
    data = config.data
    for url in filter(None, (data.dataset, data.eval_dataset)):
        preload(url, seq_len=config.model.seq_len, overlong=data.overlong, cache=cache_of(data))


def shape_of(config: Config, num_tokens: int, num_puzzles: int) -> Shape:
    """Return the sizes of the model that a resolved configuration describes."""
    model = asdict(config.model)
    return Shape(num_tokens=num_tokens, num_puzzles=num_puzzles, **model)


def check_puzzles(config: Config, dataset: Dataset, num_puzzles: int) -> None:
    """Check that the model has a vector for each puzzle, if it has any.

    Raises:
        DataError: The data have more.
    """
    if config.model.puzzle_emb_ndim and dataset.num_puzzles > num_puzzles:
        raise DataError(
            f"{dataset.url} has {dataset.num_puzzles} puzzles, and the model vectors for "
            f"{num_puzzles} (--puzzle-emb-ndim). Give data with the same puzzles."
        )


def _check_dataset(plan: Plan, stored: Mapping[str, Any]) -> None:
    ours = plan.dataset.identity()
    if ours["num_tokens"] != stored["num_tokens"]:
        raise ResumeError(
            f"--dataset {ours['url']} has {ours['num_tokens']} tokens, and the model of the "
            f"checkpoint {stored['num_tokens']} ({stored['url']}). Give data of the same kind, or "
            "choose another --checkpoint-dir."
        )
    if plan.config.model.puzzle_emb_ndim and ours["num_puzzles"] != stored["num_puzzles"]:
        raise ResumeError(
            f"--dataset {ours['url']} has {ours['num_puzzles']} puzzles, and the model of the "
            f"checkpoint vectors for {stored['num_puzzles']}. Give data with the same puzzles, or "
            "choose another --checkpoint-dir."
        )
    names = ("sha256", "num_samples", "puzzles_sha256")
    if all(ours[name] == stored.get(name, ours[name]) for name in names):
        return
    difference = (
        f"the data are not those of the checkpoint: {stored['url']} had {stored['num_samples']} "
        f"samples (sha256 {stored['sha256'][:12]}), {ours['url']} has {ours['num_samples']} "
        f"(sha256 {ours['sha256'][:12]})"
    )
    if not plan.config.checkpoint.allow_dataset_change:
        raise ResumeError(
            f"{difference[0].upper()}{difference[1:]}. Give the data it was trained on, or "
            "--allow-dataset-change to go on with these."
        )
    logger.warning("%s; going on with --allow-dataset-change", difference)


def _tell_differences(stored: Mapping[str, str], ours: Mapping[str, str]) -> None:
    for name, value in ours.items():
        if stored.get(name) != value:
            logger.warning(
                "%s is %s here and was %s when the checkpoint was written; the last bits of the "
                "results may differ from an undisturbed run",
                name,
                value,
                stored.get(name),
            )


def _datasets(plan: Plan) -> list[Dataset]:
    return [each for each in (plan.dataset, plan.eval_dataset) if each is not None]
