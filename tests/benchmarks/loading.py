"""How far resuming and S3 are from the plain transfer of the same bytes, and from others.

    python -m tests.benchmarks.loading resume  1 GiB into live tensors, from memory and from a file
    python -m tests.benchmarks.loading s3      500 MB to and from SeaweedFS on a memory file system
    ... --size full|quick|tiny

boto3 takes part where it is installed (`make bench-checkpoints` sees to that).
"""

import http.client
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import s3fs
import torch

from tests.benchmarks.table import Goal, Row, parser, publish
from tests.s3.server import BUCKET, Server
from trm_dist.checkpoint.archive import encode
from trm_dist.checkpoint.memory import remove_if_unlocked, take_slots
from trm_dist.checkpoint.seal import verify_seal
from trm_dist.checkpoint.snapshot import Flat, unflatten
from trm_dist.checkpoint.state import _Loader, records
from trm_dist.checkpoint.store import LocalStore, Store, open_store

Case = Callable[[], Any]


@dataclass(frozen=True)
class Plan:
    """How much is transferred, and how often."""

    resume_bytes: int
    resumes: int
    s3_bytes: int
    s3_rounds: int


PLANS = {
    "full": Plan(1 << 30, resumes=7, s3_bytes=500_000_000, s3_rounds=5),
    "quick": Plan(1 << 28, resumes=5, s3_bytes=500_000_000, s3_rounds=2),
    "tiny": Plan(1 << 20, resumes=2, s3_bytes=6_000_000, s3_rounds=2),
}


class Took:
    """Seconds of cases that are run in turns, there and back; the first round warms up."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._rounds = 0

    def round(self, cases: dict[str, Case]) -> None:
        """Run each case once."""
        for name in list(cases)[:: -1 if self._rounds % 2 else 1]:
            started = time.perf_counter()
            cases[name]()
            took = time.perf_counter() - started
            self.seconds.setdefault(name, []).extend([took] if self._rounds else [])
        self._rounds += 1


def resume(plan: Plan, num_tensors: int = 60) -> list[Row]:
    """Compare resuming with reading the same bytes into the same tensors."""
    torch.set_num_threads(1)
    size = plan.resume_bytes
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

        cases: dict[str, Case] = {
            "plain": plain, "memory": from_memory, "file": from_file, "torch.load": with_torch,
        }  # fmt: skip
        measured = Took()
        for _ in range(plan.resumes + 1):
            measured.round(cases)
    took = measured.seconds
    remove_if_unlocked(slots)
    return [
        Row(
            subject=f"resume of {size / 2**20:.0f} MiB", what=what, unit="s", better="less",
            ours=took[ours], peers={"torch.load, nothing verified": took["torch.load"]},
            limit={"a plain read into the tensors": took["plain"]},
        )
        for what, ours in (("from memory", "memory"), ("from a file, verified", "file"))
    ]  # fmt: skip


def s3(plan: Plan) -> list[Row]:
    """Compare a put and a get with other clients, and with raw HTTP requests of the same bytes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        server = Server(Path(directory))
        os.environ.update(server.environment)
        transfers = Transfers(server, plan.s3_bytes)
        puts, gets = Took(), Took()
        try:
            for _ in range(plan.s3_rounds + 1):
                _start_empty(server, Path(directory))
                transfers.warm_up()
                puts.round(transfers.puts())
                gets.round(transfers.gets())
        finally:
            server.kill()
    return [
        Row(
            subject=f"S3, {plan.s3_bytes / 1e6:.0f} MB, SeaweedFS on tmpfs", what=what, unit="s",
            better="less", ours=values.pop(OURS), limit={RAW: values.pop(RAW)}, peers=values,
            goal=Goal(1.7 if what == "put" else 1.25, RAW),
        )
        for what, values in (("put", puts.seconds), ("get", gets.seconds))
    ]  # fmt: skip


OURS, RAW = "trm_dist", "a raw HTTP request"


def _start_empty(server: Server, directory: Path) -> None:
    """Start it without what it holds: memory does not grow with the rounds."""
    server.kill()
    for each in directory.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    server.start()


class Transfers:
    """The ways to put the same bytes and to get them; each gets what itself has put."""

    def __init__(self, server: Server, size: int) -> None:
        self._data = os.urandom(1 << 20) * (size >> 20)
        self._store: Store = open_store(f"s3://{BUCKET}/bench")
        self._files = s3fs.S3FileSystem()
        client, where = server.client(), {"Bucket": BUCKET, "Key": "bench/raw"}
        self._put_url = client.generate_presigned_url("put_object", Params=where)
        self._get_url = client.generate_presigned_url("get_object", Params=where)
        self._boto3: Any = None
        if importlib.util.find_spec("boto3"):
            import boto3

            self._boto3 = boto3.client("s3", region_name="us-east-1")

    def warm_up(self) -> None:
        """Have a server that has just started make what it makes for its first object."""
        _request("PUT", self._put_url, self._data)

    def puts(self) -> dict[str, Case]:
        """Return the ways to put."""
        view = memoryview(self._data)
        pieces = [view[start : start + (8 << 20)] for start in range(0, len(view), 8 << 20)]

        def with_s3fs() -> None:
            with self._files.open(f"{BUCKET}/bench/s3fs", "wb") as file:
                file.write(self._data)

        found: dict[str, Case] = {
            RAW: lambda: _request("PUT", self._put_url, self._data),
            OURS: lambda: self._store.put("ours", pieces),
            "s3fs": with_s3fs,
        }
        if self._boto3:
            found["boto3"] = lambda: self._boto3.upload_fileobj(
                io.BytesIO(self._data), BUCKET, "bench/boto3"
            )
        return found

    def gets(self) -> dict[str, Case]:
        """Return the ways to get."""

        def with_s3fs() -> bytes:
            with self._files.open(f"{BUCKET}/bench/s3fs", "rb") as file:
                return file.read()

        def with_boto3() -> memoryview:
            buffer = io.BytesIO()
            self._boto3.download_fileobj(BUCKET, "bench/boto3", buffer)
            return buffer.getbuffer()

        found: dict[str, Case] = {
            RAW: lambda: _request("GET", self._get_url, None),
            OURS: lambda: self._store.view("ours"),
            "s3fs": with_s3fs,
        }
        if self._boto3:
            found["boto3"] = with_boto3
        return {name: self._checked(each) for name, each in found.items()}

    def _checked(self, get: Case) -> Case:
        def run() -> None:
            assert len(get()) == len(self._data)

        return run


def _request(method: str, url: str, body: bytes | None) -> bytearray:
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


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("what", choices=["resume", "s3"])
    asked = options.parse_args()
    measure = {"resume": resume, "s3": s3}[asked.what]
    publish(measure(PLANS[asked.size]), asked.rows)
    sys.stdout.flush()
    os._exit(0)
