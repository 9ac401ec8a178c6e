"""Trainings that go on in the middle of an epoch, as one writes them. See `position`.

    python -m tests.benchmarks.position_peers save|resume DIRECTORY WAY BATCH SKIPPED

Ways: skip, accelerate, lightning. `save` trains a few batches, saves, and moves the counters of
what it has saved to BATCH. SKIPPED is how many batches `skip` really skips; what the others would
have taken is told with the first batch.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from tests.benchmarks.tutorial import tell

FIRST = 10
"""Batches that are trained before the save."""

BATCH_SIZE = 2


def move(node: Any, batch: int) -> Any:
    """Return a tree of counters after FIRST batches as it is after `batch`."""
    if isinstance(node, Mapping):
        return {key: move(value, batch) for key, value in node.items()}
    if isinstance(node, list):
        return [move(value, batch) for value in node]
    if type(node) is not int:
        return node
    moved = {FIRST - 1: batch - 1, FIRST: batch, FIRST * BATCH_SIZE: batch * BATCH_SIZE}
    return moved.get(node, node)


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    """An epoch that is longer than the batch; rows cost next to nothing."""

    def __init__(self, batch: int) -> None:
        self._count = BATCH_SIZE * batch + 100
        self._row = torch.ones(64)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> torch.Tensor:
        return self._row


def plain(is_saving: bool, way: str, directory: str, batch: int, skipped: int) -> None:
    """Train with a DataLoader whose first batches are skipped."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    if not is_saving:
        state = torch.load(f"{directory}/snapshot.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(Rows(batch), batch_size=BATCH_SIZE, shuffle=True, generator=generator)
    tell("started")
    not_skipped_s = 0.0
    if is_saving:
        batches = iter(loader)
    elif way == "accelerate":
        from accelerate import skip_first_batches

        batches = iter(skip_first_batches(loader, batch))
    else:
        batches, began_s = iter(loader), time.perf_counter()
        for _ in range(skipped):
            next(batches)
        not_skipped_s = (time.perf_counter() - began_s) * (batch / skipped - 1)
    for _ in range(FIRST if is_saving else 1):
        model(next(batches)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    tell("batch", batch_count=batch + 1, not_skipped_s=not_skipped_s)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, f"{directory}/snapshot.pt")


def lightning(is_saving: bool, directory: str, batch: int) -> None:
    """Train with Lightning and the loader whose position it saves."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torchdata.stateful_dataloader import StatefulDataLoader

    from tests.benchmarks.with_lightning import Model, Tell

    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, max_steps=FIRST if is_saving else batch + 1,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            Tell(step_s=0.0),
            ModelCheckpoint(directory, every_n_train_steps=FIRST, save_last="link"),
        ],
    )  # fmt: skip
    loader = StatefulDataLoader(Rows(batch), batch_size=BATCH_SIZE, shuffle=True)
    trainer.fit(Model(), loader, ckpt_path=None if is_saving else "last")
    if is_saving:
        path = f"{directory}/last.ckpt"
        state = torch.load(path, weights_only=False)
        counters = ("global_step", "loops")
        torch.save(state | {name: move(state[name], batch) for name in counters}, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, directory, way, *numbers = sys.argv[1:]
    batch, skipped = map(int, numbers)
    if way == "lightning":
        lightning(what == "save", directory, batch)
    else:
        plain(what == "save", way, directory, batch, skipped)
