"""How far resuming and S3 are from the plain transfer of the same bytes. Prints ratios.

python -m tests.benchmarks.loading resume    1 GiB into live tensors, from memory and from a file
python -m tests.benchmarks.loading s3        500 MB to and from SeaweedFS on a memory file system
"""

import http.client
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from tests.s3.server import BUCKET, Server
from trm_dist.checkpoint.archive import encode
from trm_dist.checkpoint.memory import remove_if_unlocked, take_slots
from trm_dist.checkpoint.seal import verify_seal
from trm_dist.checkpoint.snapshot import Flat, unflatten
from trm_dist.checkpoint.state import _Loader, records
from trm_dist.checkpoint.store import LocalStore, open_store


def compare(cases: dict[str, Callable[[], Any]], repetitions: int, unit_bytes: int) -> None:
    """Time interleaved cases; each is compared with the first of its kind."""
    took: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repetitions + 1):
        for name, run in cases.items():
            started = time.perf_counter()
            run()
            if number:  # the first warms up
                took[name].append(time.perf_counter() - started)
    base = statistics.median(next(iter(took.values())))
    for name, values in took.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {name:44} {middle:7.3f} s ({low:.3f} to {high:.3f})"
              f" {unit_bytes / middle / 2**20:7.0f} MiB/s {middle / base:6.2f}x")  # fmt: skip


def resume(num_tensors: int = 60, size: int = 1 << 30, repetitions: int = 7) -> None:
    """Compare resuming with reading the same bytes into the same tensors."""
    torch.set_num_threads(1)
    weights = {str(number): torch.randn(size // 4 // num_tensors) for number in range(num_tensors)}
    live = list(weights.values())
    flat = Flat({"weights": weights})
    room = {"header_bytes": len(flat.header), "body_bytes": flat.num_bytes}
    slots = take_slots("/dev/shm", "benchmark", num_slots=2, **room)
    flat.copy_to(slots.begin(0))
    slots.finish(0, 1, flat.header)
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as directory:
        store = LocalStore(directory)
        held = slots.newest()
        assert held is not None
        pieces, _ = encode(held.header, held.body, {"bench": 1})
        store.put("state.pt", pieces)

        def plain() -> None:
            with open(f"{directory}/state.pt", "rb", buffering=0) as file:
                for each in live:
                    file.readinto(memoryview(each.numpy()).cast("B"))

        def from_memory() -> None:
            found = slots.newest()
            assert found is not None
            torch._foreach_copy_(
                live, list(unflatten(found.header, found.body)["weights"].values())
            )

        def from_file() -> None:
            view = store.view("state.pt")
            verify_seal(view)
            loaded = _Loader(records(view)).load()
            torch._foreach_copy_(live, list(loaded["weights"].values()))

        def with_torch() -> None:
            loaded = torch.load(f"{directory}/state.pt")
            torch._foreach_copy_(live, list(loaded["weights"].values()))

        print(f"\n{size / 2**20:.0f} MiB into live tensors, page cache warm, one thread")
        cases = {
            "plain read into the tensors": plain,
            "trm_dist, from memory": from_memory,
            "trm_dist, from a file, digest verified": from_file,
            "torch.load, nothing verified": with_torch,
        }
        compare(cases, repetitions, size)
    remove_if_unlocked(slots)


def s3(size: int = 500_000_000, repetitions: int = 5) -> None:
    """Compare a put and a get with raw HTTP requests of the same bytes to the same server."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        server = Server(Path(directory))
        server.start()
        os.environ.update(server.environment)
        try:
            _put_and_get(server, size, repetitions)
        finally:
            server.kill()


def _put_and_get(server: Server, size: int, repetitions: int) -> None:
    store = open_store(f"s3://{BUCKET}/bench")
    data = os.urandom(1 << 20) * (size >> 20)
    pieces = [memoryview(data)[start : start + (8 << 20)] for start in range(0, len(data), 8 << 20)]
    client = server.client()
    where = {"Bucket": BUCKET, "Key": "bench/raw"}
    put_url = client.generate_presigned_url("put_object", Params=where)
    get_url = client.generate_presigned_url("get_object", Params=where)

    def raw(method: str, url: str, body: bytes | None) -> bytearray:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, blocksize=1 << 20)
        connection.request(method, f"{parts.path}?{parts.query}", body=body)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        received = bytearray(int(answer.headers["Content-Length"]))
        view, filled = memoryview(received), 0
        while filled < len(received):
            filled += answer.readinto(view[filled:])
        connection.close()
        return received

    def get() -> None:
        assert len(store.view("ours")) == len(data)

    print(f"\nput {size / 1e6:.0f} MB, SeaweedFS on tmpfs, {os.cpu_count()} cores for both ends")
    puts = {
        "raw HTTP PUT": lambda: raw("PUT", put_url, data),
        "trm_dist put": lambda: store.put("ours", pieces),
    }
    compare(puts, repetitions, len(data))
    print(f"get {size / 1e6:.0f} MB")
    compare({"raw HTTP GET": lambda: raw("GET", get_url, None), "trm_dist view": get},
            repetitions, len(data))  # fmt: skip


if __name__ == "__main__":
    commands = {"resume": resume, "s3": s3}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]]()
    sys.stdout.flush()
    os._exit(0)
