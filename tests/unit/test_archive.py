"""The file: what torch.save would have written, made without torch and without a copy."""

import io
import json
import math
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import make_state, make_summary
from trm_dist.checkpoint.archive import STORAGES, encode, plain, records
from trm_dist.checkpoint.seal import verify_seal
from trm_dist.checkpoint.snapshot import Flat
from trm_dist.checkpoint.state import KEYS, digest, from_bytes

ROOT = Path(__file__).parents[2]
DTYPES = [getattr(torch, name[6:]) for name in STORAGES]


def written(tree: dict[str, Any]) -> bytes:
    flat = Flat(tree)
    buffer = memoryview(bytearray(flat.num_bytes))
    flat.copy_to(buffer)
    pieces, _ = encode(flat.header, buffer, {"branch": 1})
    return b"".join(pieces)


def read(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def random_tree(chance: random.Random, depth: int = 0) -> Any:  # noqa: PLR0911
    kind = chance.randrange(8 if depth < 4 else 5)
    match kind:
        case 0:
            return chance.choice([None, True, False, "", "Кіт\n\0", "x" * 300])
        case 1:
            return chance.choice([0, -1, 255, 256, 2**31, -(2**31), 2**63, -(2**70)])
        case 2:
            return chance.choice([0.1, -0.0, 5e-324, math.inf, 1e308])
        case 3 | 4:
            shape = [chance.randrange(4) for _ in range(chance.randrange(4))]
            return torch.randint(0, 2, shape).to(chance.choice(DTYPES))
        case 5:
            return [random_tree(chance, depth + 1) for _ in range(chance.randrange(4))]
        case 6:
            return tuple(random_tree(chance, depth + 1) for _ in range(chance.randrange(4)))
        case _:
            keys = chance.sample(["a", "b", "", "$", 0, 7, -3], chance.randrange(5))
            return {key: random_tree(chance, depth + 1) for key in keys}


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(one, other)
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return repr(one) == repr(other)


@pytest.mark.parametrize("seed", range(60))
def test_any_tree_comes_back_from_a_bare_torch_load(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    tree = {"value": [random_tree(chance) for _ in range(6)]}

    assert alike(read(written(tree)), tree)


def test_tensors_lie_in_the_records_that_torch_save_writes() -> None:
    state = make_state(7)
    stream = io.BytesIO()
    torch.save(state, stream)
    theirs = zipfile.ZipFile(stream)
    ours = zipfile.ZipFile(io.BytesIO(written(state)))
    their_folder, our_folder = (each.namelist()[0].split("/")[0] for each in (theirs, ours))

    data = [name.split("/", 1)[1] for name in theirs.namelist() if "/data/" in name]

    assert len(data) == 15
    for name in data:
        assert ours.read(f"{our_folder}/{name}") == theirs.read(f"{their_folder}/{name}")
    assert {"data.pkl", "byteorder", "version"} <= {each.split("/")[1] for each in ours.namelist()}


def test_other_zip_programs_find_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(written(make_state(7)))

    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    if shutil.which("unzip"):
        done = subprocess.run(["unzip", "-t", path], capture_output=True, text=True, check=False)
        assert "No errors detected" in done.stdout, done.stdout + done.stderr


def test_file_has_the_bytes_that_zipfile_itself_writes() -> None:
    ours = written(make_state(7) | {"empty": torch.ones(0, 3)})
    stream = io.BytesIO()

    with zipfile.ZipFile(io.BytesIO(ours)) as archive, zipfile.ZipFile(stream, "w") as own:
        own.comment = archive.comment
        for each in archive.infolist():
            record = zipfile.ZipInfo(each.filename)
            record.extra = each.extra
            with own.open(record, "w") as target:
                target.write(archive.read(each))

    assert stream.getvalue() == ours


def test_every_tensor_begins_at_a_multiple_of_64(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(written({str(size): torch.ones(size) for size in (1, 3, 1000, 7)}))

    loaded = torch.load(path, mmap=True, weights_only=True)

    assert all(each.data_ptr() % 64 == 0 for each in loaded.values())


def test_pieces_are_views_of_the_buffer_and_no_copies() -> None:
    flat = Flat({"large": torch.ones(10_000), "more": torch.zeros(500)})
    memory = bytearray(flat.num_bytes)
    flat.copy_to(memoryview(memory))

    pieces, _ = encode(flat.header, memoryview(memory), {"branch": 1})

    views = [each for each in pieces if isinstance(each, memoryview) and each.obj is memory]
    assert [len(each) for each in views] == [40_000, 2_000]
    assert sum(len(each) for each in pieces) - 42_000 < 3_000


def test_file_is_sealed_with_the_summary_of_its_state() -> None:
    flat = Flat(make_state(7))
    buffer = memoryview(bytearray(flat.num_bytes))
    flat.copy_to(buffer)

    pieces, summary = encode(flat.header, buffer)

    assert verify_seal(b"".join(pieces)).summary == summary == make_summary(7)


def test_records_are_views_of_the_file() -> None:
    data = memoryview(bytearray(written({"a": torch.arange(5.0)})))

    found = records(data)

    assert bytes(found["data/0"]) == torch.arange(5.0).numpy().tobytes()
    assert all(each.obj is data.obj for each in found.values())


def test_compressed_archive_is_refused() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1000))

    with pytest.raises(zipfile.BadZipFile, match="compressed"):
        records(stream.getbuffer())


def test_loaded_tensors_are_views_of_the_file() -> None:
    flat = Flat(make_state(7))
    buffer = memoryview(bytearray(flat.num_bytes))
    flat.copy_to(buffer)
    data = bytearray(b"".join(encode(flat.header, buffer)[0]))

    state = from_bytes(memoryview(data))

    assert digest(state) == digest(make_state(7))
    assert state.keys() == KEYS
    place = data.index(make_state(7)["model_state_dict"]["mix.weight"].numpy().tobytes())
    data[place] ^= 1
    assert digest(state) != digest(make_state(7))


def test_plain_tree_has_none_for_tensors() -> None:
    header = Flat({"a": torch.ones(2), "b": [1, (2, {"c": None})]}).header

    assert plain(json.loads(header)["tree"]) == {"a": None, "b": [1, (2, {"c": None})]}


def test_writing_needs_no_torch() -> None:
    flat = Flat({"a": torch.arange(5.0), "b": [1, 2.5, "x"]})
    buffer = bytearray(flat.num_bytes)
    flat.copy_to(memoryview(buffer))
    script = (
        "import sys, json; sys.modules['torch'] = None; sys.modules['numpy'] = None;"
        "from trm_dist.checkpoint.archive import encode;"
        "import trm_dist.checkpoint.persister;"
        "header, buffer = map(bytes.fromhex, sys.stdin.read().split());"
        "pieces, _ = encode(header, memoryview(buffer), {'branch': 1});"
        "sys.stdout.buffer.write(b''.join(pieces))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False,
        input=f"{flat.header.hex()} {buffer.hex()}".encode(),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert torch.equal(read(done.stdout)["a"], torch.arange(5.0))
