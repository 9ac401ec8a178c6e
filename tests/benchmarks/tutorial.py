"""The pattern of the torchrun tutorials: DDP, and a snapshot by torch.save that a restart loads.

It is what `recovery` compares with: nothing but a small model, an optimizer and a file.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def tell(event: str, **more: object) -> None:
    """Print an event as trm_dist does."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(json.dumps({"event": event, "time": time.time(), **more}) + "\n")
        sys.stdout.flush()


def main(path: str, step_s: float, every: int) -> None:
    """Train for ever, a snapshot after every so many batches."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = 0
    if os.path.exists(path):
        state = torch.load(path)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        batch = state["batch"]
    tell("started")
    while True:
        until_s = time.monotonic() + step_s
        model(torch.randn(16, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(max(0.0, until_s - time.monotonic()))
        batch += 1
        if dist.get_rank() == 0 and batch % every == 0:
            content = {
                "model": model.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "batch": batch,
            }
            torch.save(content, path + ".new")
            os.replace(path + ".new", path)
        tell("batch", batch_count=batch)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
