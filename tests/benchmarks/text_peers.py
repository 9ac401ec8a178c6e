"""Trainings on a file of text, as one writes them. See `large_text`.

    torchrun ... -m tests.benchmarks.text_peers json|datasets FILE CACHE

`json`: each worker parses the file and keeps the records. `datasets`: Hugging Face's package makes
an Arrow file once, which all map. Both make bytes of text when a batch asks for them.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from tests.benchmarks.tutorial import tell

SEQ_LEN, ROWS = 256, 16

Record = dict[str, str]


class Text(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Records as bytes of one length: questions and answers."""

    def __init__(self, records: Sequence[Any]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        record = self._records[number]
        question = f"{record['context']} {record['query']}".encode()[-SEQ_LEN:]
        return _padded(question), _padded(record["completion"].encode()[:SEQ_LEN])


def _padded(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.ljust(SEQ_LEN, b"\0")), dtype=torch.uint8).long()


def parsed(path: str) -> Sequence[Record]:
    """Return all records, parsed."""
    with open(path, encoding="utf-8") as file:
        if path.endswith(".json"):
            return json.load(file)["data"]
        return [json.loads(line) for line in file]


def mapped(path: str, cache: str) -> Sequence[Record]:
    """Return the records of a mapped Arrow file; the first worker makes it, if it is not there."""
    import datasets

    datasets.disable_progress_bars()
    own = {"data_files": path, "split": "train", "cache_dir": cache}
    if path.endswith(".json"):
        own["field"] = "data"
    if dist.get_rank() == 0:
        datasets.load_dataset("json", **own)
    dist.barrier()
    return datasets.load_dataset("json", **own)


def main(way: str, path: str, cache: str) -> None:
    """Train one epoch."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    data = Text(parsed(path) if way == "json" else mapped(path, cache))
    model = DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Embedding(256, 16), torch.nn.Linear(16, 256))
    )
    optimizer = torch.optim.AdamW(model.parameters())
    tell("started", num_samples=len(data))
    loader = DataLoader(data, batch_size=ROWS, sampler=DistributedSampler(data))
    for count, (questions, answers) in enumerate(loader, start=1):
        logits = model(questions)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        tell("batch", batch_count=count)


if __name__ == "__main__":
    main(*sys.argv[1:])
