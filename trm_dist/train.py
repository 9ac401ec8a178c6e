"""The trainer: builds the parts from a plan and runs the loop; where the rooms meet.

One batch: `order` says which samples -> `dataset` gives rows -> the task makes supervision steps ->
DDP with `reduction` adds up the shards' gradients -> `optim` -> `ema` -> `Progress`.
One save: live state -> `snapshot` (a copy at the batch boundary) -> `publish` -> `retention`.
"""

import logging
import math
import os
import resource
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from trm_dist import __version__, events, randomness
from trm_dist.checkpoint.cadence import Cadence
from trm_dist.checkpoint.catalog import is_whole, position, read_summary
from trm_dist.checkpoint.manager import CheckpointManager
from trm_dist.checkpoint.names import FINAL
from trm_dist.checkpoint.replay import LossLog
from trm_dist.checkpoint.state import FORMAT_VERSION, digest, sealed
from trm_dist.checkpoint.store import open_store, split_url
from trm_dist.checkpoint.tfevents import CURVES
from trm_dist.config import Config
from trm_dist.elastic.pulse import Pulse
from trm_dist.elastic.reduction import ShardReduction
from trm_dist.elastic.world import Group
from trm_dist.errors import ConfigError, TrainingError
from trm_dist.evaluate import evaluate
from trm_dist.events import Emit
from trm_dist.feed import Feed, GlobalBatch
from trm_dist.model.ema import Ema
from trm_dist.model.graphs import record
from trm_dist.model.kernels import compile_network
from trm_dist.model.optim import Optimizer
from trm_dist.model.puzzles import PuzzleOptimizer
from trm_dist.model.supervision import SCORES, Supervision
from trm_dist.model.trm import Trm, num_parameters
from trm_dist.observe.curves import Curves
from trm_dist.observe.ledger import Spend, Spent
from trm_dist.plan import Plan, environment
from trm_dist.progress import COUNTERS, Progress

logger = logging.getLogger(__name__)

_COLUMN = {name: column for column, name in enumerate(SCORES)}


def pin_numerics(threads: int) -> None:
    """Fix what the bits of a result depend on: threads and kernels. Before any tensor is made."""
    torch.set_num_threads(threads)
    # Containers of NVIDIA's allow TF32 by a variable, which shortens the factors of products.
    torch.set_float32_matmul_precision("highest")
    # Without it cuBLAS may choose by what is free; it is read when a GPU's first product is made.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # As torch.use_deterministic_algorithms does, which imports all of the compiler to tell it too.
    torch.set_deterministic_debug_mode("error")
    # Nobody reads memory before it is written, so filling it first would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Keeper(Protocol):
    """Who takes snapshots: the manager, or the bare slots of a node that does not write."""

    def capture(self, tree: dict[str, Any]) -> None:
        """Copy the state of a batch boundary; it may change once this returns."""
        ...


class Trainer:
    """One start of a run, in one worker."""

    def __init__(
        self, plan: Plan, group: Group, emit: Emit, pulse: Pulse, spend: Spend,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Build the parts and take the state of the checkpoint, if there is one.

        Args:
            plan: The same on all workers.
            group: The formed process group.
            emit: Hears the events.
            pulse: Shown signs of life.
            spend: Told what time is spent on.
            device: What this worker computes on.

        Raises:
            ConfigError: The gradients cannot be carried as the settings want.
        """
        config = plan.config
        self._plan, self._config = plan.without_state(), config
        self._group, self._emit, self._pulse, self._spend = group, emit, pulse, spend
        self._manager: CheckpointManager | None = None
        self._keeper: Keeper | None = None
        self._losses: LossLog | None = None
        self._cadence = Cadence(config.checkpoint.snapshot_every)
        # Drawn by the processor, so that a seed means the same weights everywhere.
        module = Trm(plan.shape, seed=config.data.seed, precision=config.train.precision).to(device)
        self._task = Supervision(
            module,
            n_sup=config.train.n_sup,
            halt_explore=config.train.halt_explore,
            loss=config.train.loss,
            seed=config.data.seed,
        )
        self._optimizer = Optimizer(
            module,
            lr=config.train.lr,
            warmup_steps=config.train.warmup_steps,
            weight_decay=config.train.weight_decay,
            clip=config.train.clip,
            name=config.train.optim,
        )
        self._puzzles = _puzzle_optimizer(module, config)
        self._feed = Feed(plan.dataset, config.data)
        self._ema = Ema(module, config.train.ema)
        self._curves = Curves() if config.log.tensorboard else None
        self._progress = Progress()
        self._evaluated_at = -1
        if plan.start.state is not None:
            self._restore(plan.start.state)
        if config.train.compile:
            compile_network(module)
        if device.type == "cuda":
            record(module, self._feed.rows_per_shard)
        self._reduction = ShardReduction(
            module.parameters(),
            num_shards=config.data.shards,
            rank=group.world.rank,
            world_size=group.world.size,
            carrier=group.carrier(config.train.backend, device),
            is_reused=device.type == "cuda",
        )
        with warnings.catch_warnings():
            # Renamed forward_sync_buffers in torch 2.13; the old name works in all versions.
            warnings.simplefilter("ignore", FutureWarning)
            self._ddp = DistributedDataParallel(
                module, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self._ddp.register_comm_hook(None, self._reduction.hook)

    def loss_log(self, buffer: memoryview) -> LossLog:
        """Return the log in which the losses of this run can be compared."""
        plan = self._plan
        subject = {
            "run": (plan.start.run.run_id, plan.start.run.branch),
            "dataset": plan.dataset.sha256 + plan.dataset.puzzles_sha256,
            "config": plan.config.exact(),
        }
        return LossLog(buffer, subject, environment(plan.config))

    def run(
        self, keeper: Keeper | None, manager: CheckpointManager | None, losses: LossLog | None
    ) -> None:
        """Train to the end, evaluate, and leave the final checkpoint.

        Args:
            keeper: Takes the snapshots; in one worker of each node.
            manager: In the writer only, where it is the keeper too.
            losses: What the batches gave before; in one worker of each node.
        """
        self._keeper, self._manager, self._losses = keeper, manager, losses
        started_s, first = time.monotonic(), self._progress
        self._tell_start()
        self._pulse.beat(first.batch_count)
        self._spend(Spent.SAVE_STALL)
        if keeper:
            keeper.capture(self.state())
        if manager and self._plan.start.is_unnamed:  # killed between its capture and its publish
            manager.save_if_due()
        if self._curves and not self._curves.has_evaluation(first.batch_count):
            self._evaluate_if_due()  # killed in the middle of it
        while not self._is_finished():
            batch = self._train_batch()
            self._compare(batch)
            if self._curves:
                self._curves.add(batch)
            self._spend(Spent.SAVE_STALL)
            is_kept = self._keep(batch.seconds)
            self._pulse.beat(self._progress.batch_count)
            # With a snapshot after each, a batch that was told of is in one.
            self._emit(replace(batch, has_snapshot=is_kept))
            if manager and is_kept:
                manager.save_if_due()
            self._evaluate_if_due()
        self._finish(first, time.monotonic() - started_s)

    def _compare(self, batch: events.Batch) -> None:
        """Tell of the first batch that gives another loss than before the restart."""
        found = self._losses.check(batch.progress.batch_count, batch.loss) if self._losses else None
        if found:
            self._losses = None
            self._emit(
                events.Diverged(
                    progress=batch.progress,
                    loss=batch.loss,
                    loss_before=found.before,
                    is_other_environment=found.is_other_environment,
                )
            )

    def _keep(self, batch_s: float) -> bool:
        """Capture this boundary if it is due."""
        count = self._progress.batch_count
        is_due = (
            self._cadence.is_due(count)
            or count % self._config.checkpoint.checkpoint_interval == 0
            or self._is_finished()
        )
        if self._keeper and is_due:
            started_s = time.monotonic()
            self._keeper.capture(self.state())
            self._cadence.measure(copy_s=time.monotonic() - started_s, batch_s=batch_s)
        return is_due

    def _is_finished(self) -> bool:
        return self._progress.is_finished(
            epochs=self._config.train.epochs, batches_per_epoch=self._plan.batches_per_epoch
        )

    # -- one batch ---------------------------------------------------------------------------------

    def _train_batch(self) -> events.Batch:
        started_s = time.monotonic()
        at = self._progress.at_next_batch(self._plan.batches_per_epoch)
        self._spend(Spent.DATA_WAIT)
        batch = self._feed.batch(at)
        device = self._task.device
        rows = [self._feed.rows(batch, shard).to(device) for shard in self._local_shards()]
        self._spend(Spent.PRODUCTIVE)
        carries = [self._task.start(each) for each in rows]
        table = torch.zeros(self._config.data.shards, len(SCORES), dtype=torch.float64)
        steps = 0
        for _ in range(self._task.max_steps):
            scores = self._supervise(batch, carries)
            if not self._is_finite(scores):
                if self._config.train.on_nan == "stop":
                    raise TrainingError(_not_finite(at, batch.samples))
                self._optimizer.drop_gradients()
                self._emit(events.Skipped(progress=at, samples=batch.samples.tolist()))
                break
            self._change(at.global_step + steps)
            table += scores
            steps += 1
            if not scores[:, _COLUMN["active"]].any():
                break
        rate = self._optimizer.rate(at.global_step + max(0, steps - 1))
        self._progress = at.advance(samples=len(batch.samples), optimizer_steps=steps)
        return self._describe(table, len(batch.samples), rate, time.monotonic() - started_s)

    def _change(self, global_step: int) -> None:
        """Make one optimizer step."""
        self._optimizer.step(global_step)
        if self._puzzles:
            self._puzzles.step(global_step)
        self._ema.update()

    def _supervise(self, batch: GlobalBatch, carries: list[Any]) -> Tensor:
        """Make one supervision step of all shards, up to the reduced gradient.

        Args:
            batch: What is trained.
            carries: One for each local shard; each is replaced by the next.

        Returns:
            The scores of every shard, [shards, SCORES], the same on all workers.
        """
        shape = self._config.data.shards, len(SCORES)
        table = torch.zeros(shape, dtype=torch.float64, device=self._task.device)
        gradients = self._puzzles.begin(self._feed.puzzles(batch)) if self._puzzles else None
        last = len(carries) - 1
        for number, shard in enumerate(self._local_shards()):
            with nullcontext() if number == last else self._ddp.no_sync():
                objective, scores, carries[number] = self._task.step(self._ddp, carries[number])
                objective.backward()  # type: ignore[no-untyped-call]
            if number != last:
                self._reduction.take(shard)
            if shard in self._reduction.shards:
                table[shard] = scores
                if self._puzzles:
                    first, carry = shard * self._feed.rows_per_shard, carries[number]
                    self._puzzles.take(first, carry.vectors.grad, carry.was_active)
        self._reduction.finish()
        if gradients is not None:
            self._group.sum_(gradients)
        scores = table.cpu()  # where a GPU computes, this waits for it
        self._pulse.beat()
        self._spend(Spent.PRODUCTIVE)
        return self._group.sum_(scores)

    def _is_finite(self, scores: Tensor) -> bool:
        """Clip; tell whether loss and gradient are finite, which all workers see alike."""
        norm = self._optimizer.clip()
        if self._puzzles and not self._puzzles.is_finite():
            return False
        return bool(scores[:, _COLUMN["objective"]].isfinite().all() and norm.isfinite())

    def _local_shards(self) -> range:
        """The shards this worker runs; one beyond the shards runs the first, to no effect."""
        return self._reduction.shards or range(1)

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> None:
        interval, count = self._config.train.eval_interval, self._progress.batch_count
        if interval and count and count % interval == 0:
            self._evaluate()

    def _evaluate(self) -> None:
        """Evaluate the averaged weights, once at each boundary."""
        dataset = self._plan.eval_dataset
        if dataset is None or self._evaluated_at == self._progress.batch_count:
            return
        started_s = time.monotonic()
        self._spend(Spent.EVALUATION)
        with self._ema.averaged():
            found = evaluate(
                self._task, dataset, self._group,
                num_rows=self._feed.rows_per_shard, on_step=self._show_evaluation,
            )  # fmt: skip
        self._spend(Spent.SAVE_STALL)
        self._evaluated_at = self._progress.batch_count
        seconds = time.monotonic() - started_s
        told = events.Evaluated(progress=self._progress, seconds=seconds, **asdict(found))
        if self._curves:
            self._curves.add(told)
            if self._keeper:
                self._keeper.capture(self.state())  # the point is in a snapshot when it is told
        self._emit(told)

    def _show_evaluation(self) -> None:
        self._pulse.beat()
        self._spend(Spent.EVALUATION)

    # -- state -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the live state under a checkpoint's keys."""
        config, world, step = self._config, self._group.world, self._progress.global_step
        return self._progress.as_dict() | {
            "model_state_dict": self._task.module.state_dict(),
            "optimizer_state_dict": self._optimizer.state_dict(),
            "scheduler_state_dict": self._optimizer.scheduler_state_dict(step),
            "ema_state_dict": self._ema.state_dict(),
            "rng_state": {
                "seed": config.data.seed,
                "algorithm": randomness.ALGORITHM,
                "version": randomness.VERSION,
            },
            "config": config.flat(),
            "dataset": self._plan.dataset.identity(),
            "world": {
                "world_size": world.size,
                "num_nodes": world.num_nodes,
                "shards": config.data.shards,
            },
            "run": self._plan.start.run.summary() | {
                "torch": torch.__version__,
                "trm_dist": __version__,
                "environment": environment(config),
            },
            "format_version": FORMAT_VERSION,
        } | ({CURVES: self._curves.state_dict()} if self._curves else {})  # fmt: skip

    def _restore(self, state: dict[str, Any]) -> None:
        self._task.module.load_state_dict(state["model_state_dict"])
        self._optimizer.load_state_dict(state["optimizer_state_dict"])
        self._ema.load_state_dict(state["ema_state_dict"])
        self._progress = Progress(**{name: state[name] for name in COUNTERS})
        if self._curves and CURVES in state and self._plan.start.run.is_that_of(state["run"]):
            self._curves.load_state_dict(state[CURVES])

    def _finish(self, first: Progress, seconds: float) -> None:
        if self._has_final():
            logger.info("already at its total of %d epochs", self._config.train.epochs)
        else:
            if self._manager:
                self._manager.save_soon()  # the evaluation may take long
            self._evaluate()
            if self._manager:
                self._manager.save_final()
        if self._manager and self._config.checkpoint.save:
            self._export(self._config.checkpoint.save)
        num_samples = self._progress.samples_seen - first.samples_seen
        self._emit(
            events.Finished(
                progress=self._progress,
                digest=digest(self.state()),
                seconds=seconds,
                samples_per_s=num_samples / seconds if seconds else 0.0,
                peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            )
        )
        self._group.barrier()

    def _has_final(self) -> bool:
        """Tell whether the final checkpoint lies there; the writer's answer counts for all."""
        answer = b""
        if self._manager:
            store = open_store(self._config.checkpoint.checkpoint_dir)
            summary = read_summary(store, FINAL)
            run = self._plan.start.run
            ours = run.branch, self._progress.batch_count
            is_ours = summary and summary["run_id"] == run.run_id and position(summary) == ours
            with self._excused():
                answer = b"1" if is_ours and is_whole(store, FINAL) else b""
        return bool(self._group.broadcast(answer))

    @contextmanager
    def _excused(self) -> Iterator[None]:
        """Let nobody be taken for hung while this worker reads or writes something large."""
        is_done = threading.Event()

        def keep_excusing() -> None:
            while not is_done.wait(1.0):
                self._pulse.beat()
                self._group.excuse()

        threading.Thread(target=keep_excusing, name="excuse", daemon=True).start()
        try:
            yield
        finally:
            is_done.set()

    def _export(self, url: str) -> None:
        """Write the final model: averaged weights, and what it takes to build the model again."""
        with self._ema.averaged():
            content = self._progress.as_dict() | {
                "model_state_dict": self._task.module.state_dict(),
                "config": self._config.flat(),
                "dataset": self._plan.dataset.identity(),
                "run": self._plan.start.run.summary(),
                "format_version": FORMAT_VERSION,
            }
            directory, name = split_url(url)
            try:
                with self._excused():
                    open_store(directory).put(name, sealed(content))
            except OSError as error:
                raise ConfigError(
                    f"--save {url} cannot be written: {error}. Training is complete; give the "
                    "same command with another --save."
                ) from error
        logger.info("final model written to %s", url)

    # -- telling -----------------------------------------------------------------------------------

    def _tell_start(self) -> None:
        plan, world = self._plan, self._group.world
        self._emit(
            events.Started(
                progress=self._progress,
                source=plan.start.source,
                world_size=world.size,
                settings=plan.settings.described(),
                num_parameters=num_parameters(self._task.module),
                num_samples=plan.dataset.num_samples,
                notes=dict(plan.dataset.notes),
                batches_per_epoch=plan.batches_per_epoch,
                total_batches=plan.total_batches,
                restarts=world.restarts,
                generation=plan.start.run.generation,
                failures=plan.start.run.failures,
                preemptions=plan.start.run.preemptions,
            )
        )
        if world.size > self._config.data.shards and world.is_writer:
            logger.warning(
                "%d workers for %d shards: %d of them only keep pace; use a larger --shards",
                world.size,
                self._config.data.shards,
                world.size - self._config.data.shards,
            )

    def _describe(
        self, table: Tensor, num_samples: int, rate: float, seconds: float
    ) -> events.Batch:
        sums = dict(zip(SCORES, map(math.fsum, table.T.tolist()), strict=True))
        rows, cells = max(1.0, sums["rows"]), max(1.0, sums["cells"])
        return events.Batch(
            progress=self._progress,
            loss=sums["loss"] / rows,
            token_accuracy=sums["correct"] / cells,
            exact_accuracy=sums["exact"] / rows,
            mean_steps=sums["steps"] / rows,
            lr=rate,
            num_samples=num_samples,
            seconds=seconds,
        )


def _puzzle_optimizer(module: Trm, config: Config) -> PuzzleOptimizer | None:
    if not config.model.puzzle_emb_ndim:
        return None
    return PuzzleOptimizer(
        module.puzzle_embedding,
        batch_size=config.data.batch_size,
        lr=config.train.puzzle_emb_lr,
        warmup_steps=config.train.warmup_steps,
        weight_decay=config.train.puzzle_emb_weight_decay,
    )


def _not_finite(at: Progress, samples: npt.NDArray[np.int64]) -> str:
    return (
        f"The loss or gradient of epoch {at.epoch}, batch {at.batch_idx} is not finite. Its "
        f"samples: {samples.tolist()}. The last checkpoint stands. Look at these, lower "
        "--lr, or leave such batches early with --on-nan skip."
    )
