"""Settings: one frozen dataclass per subject, checked, and knowing where each value came from.

The dataclasses are the command line (tyro reads fields, docstrings and defaults), so a setting is
declared once. A flag that is not given takes the value stored in the checkpoint; defaults apply to
a fresh start only. `resolve` keeps that order and remembers the origin of every value.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, Self

import tyro

from trm_dist.errors import ConfigError, ResumeError

Origin = Literal["given", "stored", "default"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model; all of it must match on resume."""

    net: Literal["mlp", "attn"] = "mlp"
    """How positions are mixed: a gated MLP over them, or self-attention with rotary positions."""
    dim: int = 128
    """Width of the network (512 in the paper)."""
    depth: int = 2
    """Blocks of the network."""
    heads: int = 0
    """Attention heads; 0: one for every 64 of --dim. Read by --net attn only."""
    seq_len: int = 0
    """Positions of a sample; 0: what the data set needs (16 for 4x4 Sudoku, 256 for text)."""
    prefix_len: int = 0
    """Extra positions in front, which start from zero (16 in the paper)."""
    puzzle_emb_ndim: int = 0
    """Length of a vector that each puzzle of a folder learns, at most --prefix-len times --dim (512
    in the public code); 0: none."""
    expansion: float = 4.0
    """Expansion of the gated MLPs."""
    h_cycles: int = 3
    """T: rounds of refinement in a supervision step; only the last one has a gradient."""
    l_cycles: int = 6
    """n: updates of the latent before each update of the output."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "h_cycles", "l_cycles"):
            _require(self, name, lambda value: value >= 1, "must be at least 1")
        for name in ("heads", "seq_len", "prefix_len", "puzzle_emb_ndim"):
            _require(self, name, lambda value: value >= 0, "must not be negative")
        _require(self, "expansion", lambda value: 0 < value <= 64, "must be in (0, 64]")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What the model is fed."""

    dataset: Annotated[str, tyro.conf.arg(aliases=["--data"])] = ""
    """A JSON or JSONL file or a CSV file of 9x9 puzzles (a path or any fsspec URL), a folder with
    dataset.json, or sudoku4:train?count=20000&seed=0, or sudoku9:..."""
    eval_dataset: str = ""
    """A data set to evaluate on, in the same forms; empty: no evaluation."""
    augment: int = 0
    """Disguises of each training puzzle besides itself, by the symmetries of Sudoku."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """What happens to a text record that does not fit --seq-len."""
    cache_dir: str = ""
    """Where this node keeps encoded data; empty: ~/.cache/trm_dist; none: nowhere."""
    cache_gb: float = 50.0
    """How large that may become; what was not used for the longest time goes first."""
    batch_size: int = 4
    """Samples of a batch over all workers; the same at every world size."""
    shards: int = 0
    """Fixed parts of a batch; 0: the largest power of two up to 8 that divides --batch-size."""
    seed: int = 0
    """Seed of the weights, the order of samples and the halting exploration."""

    def __post_init__(self) -> None:
        _require(self, "batch_size", lambda value: value >= 1, "must be at least 1")
        for name in ("shards", "cache_gb", "augment"):
            _require(self, name, _is_size, "must be finite and not negative")
        _require(self, "seed", lambda value: 0 <= value < 2**63, "must be in [0, 2^63)")
        if self.shards and self.batch_size % self.shards:
            raise ConfigError(
                f"--shards {self.shards} does not divide --batch-size {self.batch_size}, and every "
                f"shard must have the same number of rows. Use {_shards_for(self.batch_size)}, "
                "or leave the flag out."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How the weights are changed."""

    epochs: int = 10
    """Epochs in total, over all restarts; may be raised on resume."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--learning-rate"])] = 1e-4
    """Learning rate after the warm-up."""
    warmup_steps: int = 2000
    """Optimizer steps over which the learning rate rises from zero; constant afterwards."""
    weight_decay: float = 0.1
    """Decoupled weight decay (1.0 in the paper on small data)."""
    puzzle_emb_lr: float = 1e-2
    """Learning rate of the puzzles' vectors, by SignSGD; warmed up like --lr."""
    puzzle_emb_weight_decay: float = 0.1
    """Decoupled weight decay of the vectors of the puzzles in a batch."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones evaluated."""
    n_sup: int = 16
    """Most supervision steps of a batch; each is one optimizer step."""
    halt_explore: float = 0.1
    """Share of samples that may not halt before a random step of 2..n_sup."""
    loss: Literal["stablemax", "softmax"] = "stablemax"
    """Cross-entropy over the tokens."""
    optim: Literal["adamw", "adam-atan2"] = "adamw"
    """Optimizer; adam-atan2 is that of TRM's public code."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the activations; weights, norms, losses and sums are fp32 either way."""
    compile: bool = False
    """Let torch's compiler write the network's kernels: faster, above all on a GPU, and a start
    takes longer. Needs a C compiler."""
    on_nan: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite: stop with the samples' numbers, or leave the batch."""
    eval_interval: int = 0
    """Batches between evaluations; 0: at the end only."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What computes; auto: a GPU where this machine has one, worker i of a node on GPU i."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """What carries gradients; auto: nccl where each worker has a GPU of its own, else gloo."""
    threads: int = 1
    """Threads of a worker; another number may change the last bits of every sum."""
    hang_timeout: float = 0.0
    """Seconds without a sign of life after which a worker counts as hung or lost; 0: found out."""
    max_no_progress: int = 10
    """Failures in a row without a new batch, after which a run gives up; 0: never."""
    max_preemptions: int = 100
    """The same for stops from outside, which are no failures; 0: never."""
    cpu_capability: Literal["auto", "default", "avx2", "avx512"] = "auto"
    """Processor instructions to use: what the processor has, or one level on nodes of any age."""

    def __post_init__(self) -> None:
        for name in ("epochs", "n_sup", "threads"):
            _require(self, name, lambda value: value >= 1, "must be at least 1")
        for name in (
            "warmup_steps", "eval_interval", "weight_decay", "clip", "puzzle_emb_weight_decay",
        ):  # fmt: skip
            _require(self, name, _is_size, "must be finite and not negative")
        for name in ("max_no_progress", "max_preemptions"):
            _require(self, name, lambda value: value >= 0, "must not be negative")
        _require(self, "hang_timeout", _is_size, "must be finite and not negative")
        for name in ("lr", "puzzle_emb_lr"):
            _require(self, name, lambda value: 0 < value < math.inf, "must be finite and above 0")
        for name in ("ema", "halt_explore"):
            _require(self, name, lambda value: 0 <= value < 1, "must be in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """What is kept, and where a run goes on."""

    checkpoint_dir: str = "checkpoints"
    """Directory of the checkpoints."""
    checkpoint_interval: int = 100
    """Batches between checkpoints with a name of their own."""
    latest_every_s: float = 60.0
    """Seconds after which checkpoint_latest.pt is renewed between those."""
    keep_last: int = 0
    """Newest checkpoints with a name of their own to keep; 0: all."""
    keep_every: int = 0
    """Keep also each checkpoint whose batch count is a multiple of this; 0: none."""
    store_deadline: float = 1800.0
    """Seconds without a commit, while commits fail, after which training stops."""
    snapshot_every: int | Literal["auto"] = 1
    """Batches between memory snapshots; auto: as many as keep their cost under 1 %."""
    snapshot_slots: int = 3
    """Memory snapshots a node has room for; 0: none that outlive the workers."""
    snapshot_dir: str = "/dev/shm"  # noqa: S108 its files are private to the user
    """Directory of a memory file system for them."""
    grace_period: float = 25.0
    """Seconds that a stop may take to save the newest state; torchrun kills after 30."""
    save: str = ""
    """File for the final model (averaged weights and configuration); empty: none."""
    resume: str = "auto"
    """auto: the newest valid state, else a fresh start; never: a fresh start; or a file."""
    overwrite: bool = False
    """With --resume never: start over in a used directory. With a file: start one more branch."""
    allow_dataset_change: bool = False
    """Go on although the data are not those of the checkpoint."""

    def __post_init__(self) -> None:
        _require(self, "checkpoint_dir", bool, "must not be empty")
        _require(self, "checkpoint_interval", lambda value: value >= 1, "must be at least 1")
        for name in (
            "latest_every_s", "keep_last", "keep_every", "store_deadline", "grace_period",
        ):  # fmt: skip
            _require(self, name, _is_size, "must be finite and not negative")
        _require(self, "snapshot_every", lambda value: value == "auto" or value >= 1,
                 "must be at least 1, or auto")  # fmt: skip
        _require(self, "snapshot_slots", lambda value: value == 0 or 2 <= value <= 16,
                 "must be 0, or 2 to 16")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is told, and how."""

    log_format: Literal["text", "json"] = "text"
    """text: a bar on a terminal and lines elsewhere; json: every event as one object a line."""
    log_every_s: float = 5.0
    """Seconds between progress lines of --log-format text."""
    metrics_port: int = 0
    """Port on which the writer answers GET /metrics of Prometheus; 0: none."""
    tensorboard: bool = False
    """Write event files for TensorBoard beside the checkpoints, in .trm_dist/tensorboard."""

    def __post_init__(self) -> None:
        _require(self, "log_every_s", _is_size, "must be finite and not negative")
        _require(self, "metrics_port", lambda port: 0 <= port < 1 << 16, "is not a port")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpotConfig:
    """How this machine says that it is about to go."""

    spot: Literal["auto", "aws", "gcp", "azure", "none"] = "auto"
    """Whose notices to watch for; auto: found out at the start."""
    leave_on_rebalance: bool = False
    """On AWS: leave on a rebalance recommendation too, and not only on the notice."""
    preemption_file: str = ""
    """A file whose appearance is a notice as well; empty: none."""
    metadata_url: str = ""
    """Where the provider's metadata are; empty: where all providers have them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything a run can be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    spot: SpotConfig = field(default_factory=SpotConfig)

    def flat(self) -> dict[str, Any]:
        """Return every setting by its name; names are unique over the subjects."""
        subjects = [getattr(self, each.name) for each in fields(self)]
        return {
            each.name: getattr(owner, each.name) for owner in subjects for each in fields(owner)
        }

    def exact(self) -> dict[str, Any]:
        """Return the settings that the bits of a batch depend on, besides data and environment."""
        values = self.flat()
        return {name: values[name] for name in sorted(_EXACT)}

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Return a copy in which the named settings are replaced; each value is checked.

        Raises:
            ConfigError: A value is out of its range.
        """
        changed = {}
        for each in fields(self):
            subject = getattr(self, each.name)
            own = {each.name for each in fields(subject)} & values.keys()
            changed[each.name] = replace(subject, **{name: values[name] for name in own})
        return replace(self, **changed)


PER_START = frozenset({
    "checkpoint_dir", "resume", "overwrite", "allow_dataset_change", "snapshot_dir",
    "snapshot_slots", "grace_period", "cpu_capability", "hang_timeout",
    "max_no_progress", "max_preemptions", "spot", "leave_on_rebalance", "preemption_file",
    "metadata_url", "cache_dir", "cache_gb", "metrics_port", "device", "backend",
})  # fmt: skip
"""Settings that speak of one start and are not taken from a checkpoint."""

_EXACT = frozenset(
    each.name for subject in (ModelConfig, DataConfig, TrainConfig) for each in fields(subject)
) - {
    "dataset",
    "eval_dataset",
    "cache_dir",
    "cache_gb",
    "epochs",
    "eval_interval",
    "threads",
    "hang_timeout",
    "max_no_progress",
    "max_preemptions",
    "cpu_capability",
    "device",
    "backend",
}

IDENTITY = frozenset({each.name for each in fields(ModelConfig)} | {"batch_size", "shards", "seed"})
"""Settings that make a run what it is: another value cannot continue it."""

_BEFORE = {"puzzle_emb_ndim": 0}
"""What runs had whose checkpoints do not know a setting of IDENTITY yet."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration that remembers where each of its values came from."""

    config: Config
    origins: Mapping[str, Origin]

    def described(self) -> dict[str, str]:
        """Return every setting as "value (origin)"."""
        return {
            name: f"{value} ({self.origins[name]})" for name, value in self.config.flat().items()
        }

    def with_derived(self, **values: Any) -> "Settings":
        """Put real values in the place of those that said "derive it" (0), keeping the origins."""
        return replace(self, config=self.config.with_values(values))


def resolve(config: Config, given: Iterable[str], stored: Mapping[str, Any] | None) -> Settings:
    """Give every setting its value: given, else stored, else default.

    Args:
        config: What the command line said, defaults included.
        given: Names of the settings that were really given.
        stored: Flat settings of the checkpoint to go on from; None on a fresh start.

    Raises:
        ResumeError: Given values differ from stored ones that make the run what it is; the
            message lists all of them.
    """
    flat, given, stored = config.flat(), frozenset(given), {**_BEFORE, **stored} if stored else {}
    wrong = [
        f"  {flag(name)}: stored {stored[name]}, given {flat[name]}"
        for name in flat
        if name in IDENTITY & given & stored.keys() and not _same(name, flat[name], stored[name])
    ]
    if wrong:
        raise ResumeError(
            "The flags do not match the checkpoint to go on from:\n" + "\n".join(wrong) + "\n"
            "Leave these flags out to take the stored values, or choose another --checkpoint-dir."
        )
    taken = {
        name: value
        for name, value in stored.items()
        if name in flat and name not in PER_START and (name not in given or name in IDENTITY)
    }
    origins: dict[str, Origin] = {
        name: "given" if name in given else "stored" if name in taken else "default"
        for name in flat
    }
    return Settings(config.with_values(taken), origins)


def derived_sizes(config: Config, *, seq_len: int) -> dict[str, int]:
    """Return the real values of derived settings; `seq_len` is that of the data."""
    model, data = config.model, config.data
    return {
        "heads": model.heads or max(1, model.dim // 64),
        "seq_len": seq_len,
        "shards": data.shards or _shards_for(data.batch_size),
    }


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def check_sizes(model: ModelConfig) -> None:
    """Check what only the resolved sizes show.

    Raises:
        ConfigError: The width cannot be divided among the heads, or the puzzles' vectors have no
            room.
    """
    if model.puzzle_emb_ndim > model.prefix_len * model.dim:
        raise ConfigError(
            f"--puzzle-emb-ndim {model.puzzle_emb_ndim} does not fit into --prefix-len "
            f"{model.prefix_len} positions of --dim {model.dim}. Use a prefix of "
            f"{-(-model.puzzle_emb_ndim // model.dim)} or more."
        )
    if model.net == "attn" and (model.dim % model.heads or model.dim // model.heads % 2):
        raise ConfigError(
            f"--heads {model.heads} does not divide --dim {model.dim} into parts of even width, "
            "which rotary positions need. Change one of the two."
        )


def _same(name: str, given: Any, stored: Any) -> bool:
    derives = given == 0 and name in {"heads", "seq_len", "shards"}
    return derives or bool(given == stored)


def _shards_for(batch_size: int) -> int:
    return next(count for count in (8, 4, 2, 1) if batch_size % count == 0)


def _is_size(value: float) -> bool:
    return 0 <= value < math.inf


def _require(subject: Any, name: str, holds: Callable[[Any], bool], rule: str) -> None:
    value = getattr(subject, name)
    if not holds(value):
        raise ConfigError(f"{flag(name)} {value} {rule}.")
