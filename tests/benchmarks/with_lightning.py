"""What `tutorial` does, with Lightning: a restart goes on with the last checkpoint.

It is what `recovery` compares with: Trainer, ModelCheckpoint, `ckpt_path="last"`.
"""

import os
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.benchmarks.tutorial import tell


class Rows(Dataset[Tensor]):
    """Random rows, drawn when they are asked for."""

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, number: int) -> Tensor:
        return torch.randn(64)


class Model(LightningModule):
    """A layer."""

    def __init__(self) -> None:
        super().__init__()
        self._layer = torch.nn.Linear(64, 64)

    def training_step(self, rows: Tensor) -> Tensor:
        return self._layer(rows).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class Tell(Callback):
    """Events as trm_dist has them, at a given pace."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tell("started")

    def on_train_batch_start(self, *_: Any) -> None:
        self._until_s = time.monotonic() + self._step_s

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        time.sleep(max(0.0, self._until_s - time.monotonic()))
        tell("batch", batch_count=trainer.global_step)


def main(directory: str, step_s: float, every: int) -> None:
    """Train for ever, a checkpoint after every so many batches and where an exception is raised."""
    torch.set_num_threads(1)
    trainer = Trainer(
        accelerator="cpu", devices=int(os.environ["LOCAL_WORLD_SIZE"]), strategy="ddp",
        max_epochs=-1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            Tell(step_s),
            ModelCheckpoint(
                dirpath=directory, every_n_train_steps=every, save_last="link",
                save_on_exception=True,  # which a SIGTERM is
            ),
        ],
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(Rows(), batch_size=8), ckpt_path="last")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
