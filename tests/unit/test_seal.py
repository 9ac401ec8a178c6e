"""The seal: a digest of every byte, in a file that all zip readers still read."""

import io
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import make_bytes, make_state, make_summary, small_archive, to_bytes
from trm_dist.checkpoint.seal import MAX_COMMENT_BYTES, read_seal, seal, verify_seal
from trm_dist.checkpoint.state import find_damage
from trm_dist.errors import CorruptCheckpointError

EMPTY_BYTES = len(small_archive(make_summary(), b"?")) - 1

SIZES = [
    EMPTY_BYTES + 1,
    MAX_COMMENT_BYTES - 1,
    MAX_COMMENT_BYTES,
    MAX_COMMENT_BYTES + 1,
    2 * MAX_COMMENT_BYTES,
    50_000,
]


def archive_of(num_bytes: int) -> bytes:
    data = small_archive(make_summary(), bytes(num_bytes - EMPTY_BYTES))
    assert len(data) == num_bytes
    return data


def is_damage_found(data: bytes) -> bool:
    try:
        verify_seal(data)
    except CorruptCheckpointError:
        return True
    return bool(find_damage(data, "checkpoint_latest.pt"))


def with_flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    data = make_bytes()
    assert 5_000 < len(data) < 50_000
    assert find_damage(data, "checkpoint_latest.pt") == []
    return data


@pytest.mark.parametrize("num_bytes", SIZES)
def test_seal_comes_back_verified(num_bytes: int) -> None:
    found = verify_seal(archive_of(num_bytes))

    assert found.summary == make_summary()


@pytest.mark.parametrize("num_bytes", SIZES)
def test_seal_is_read_from_the_tail_alone(num_bytes: int) -> None:
    data = archive_of(num_bytes)

    assert read_seal(data[-MAX_COMMENT_BYTES:]) == verify_seal(data)


@pytest.mark.parametrize("num_bytes", SIZES)
def test_seal_of_a_memoryview_is_that_of_its_bytes(num_bytes: int) -> None:
    data = archive_of(num_bytes)

    assert verify_seal(memoryview(data)) == verify_seal(data)


def test_seal_digest_differs_for_other_content() -> None:
    digests = {verify_seal(small_archive({}, b"%d" % number)).digest for number in range(50)}

    assert len(digests) == 50


def test_seal_digest_covers_the_summary() -> None:
    one, two = (small_archive({"branch": branch}, b"same") for branch in (1, 2))

    assert verify_seal(one).digest != verify_seal(two).digest


def test_seal_keeps_text_of_any_script() -> None:
    summary = {"origin": 'Кіт "中"\n\\', "batch_count": 2**60, "created_at": 1.25, "none": None}

    assert verify_seal(small_archive(summary)).summary == summary


def test_seal_makes_no_copy_of_the_archive() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("content", bytes(1000))
    data = stream.getvalue()
    body, end = memoryview(data)[:-22], memoryview(data)[-22:]

    pieces = seal([body, end], {"branch": 1})

    assert pieces[0] is body
    assert all(each.obj is data for each in pieces[:-1] if isinstance(each, memoryview))


@pytest.mark.parametrize("num_bytes", SIZES)
def test_zipfile_reads_a_sealed_file(num_bytes: int) -> None:
    with zipfile.ZipFile(io.BytesIO(archive_of(num_bytes))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["content"]


def test_zipfile_finds_a_checkpoint_whole(checkpoint: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) > 10


def test_bare_torch_load_gives_the_counters_of_the_guide(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pt"
    path.write_bytes(to_bytes(make_state(batch_count=7, epoch=3, batch_idx=2))[0])

    found = torch.load(path)

    assert (found["epoch"], found["batch_idx"], found["batch_count"]) == (3, 2, 7)


@pytest.mark.parametrize("seed", range(4))
def test_every_random_bit_flip_is_found(checkpoint: bytes, seed: int) -> None:
    bits = random.Random(seed).sample(range(8 * len(checkpoint)), 250)

    missed = [bit for bit in bits if not is_damage_found(with_flip(checkpoint, bit))]

    assert missed == []


def test_every_bit_flip_in_seal_and_end_record_is_found(checkpoint: bytes) -> None:
    start = checkpoint.rfind(b"PK\x05\x06")

    bits = range(8 * start, 8 * len(checkpoint))
    missed = [bit for bit in bits if not is_damage_found(with_flip(checkpoint, bit))]

    assert missed == []


@pytest.mark.parametrize("num_bytes", [EMPTY_BYTES + 1, MAX_COMMENT_BYTES + 1])
def test_every_bit_flip_is_found_in_small_archives(num_bytes: int) -> None:
    data = archive_of(num_bytes)

    for bit in range(0, 8 * len(data), 7):
        with pytest.raises(CorruptCheckpointError):
            verify_seal(with_flip(data, bit))


def test_truncation_anywhere_is_found(checkpoint: bytes) -> None:
    places = [*random.Random(0).sample(range(len(checkpoint)), 100), 0, 1, len(checkpoint) - 1]

    missed = [place for place in places if not is_damage_found(checkpoint[:place])]

    assert missed == []


@pytest.mark.parametrize("num_bytes", SIZES[:4])
def test_every_truncation_of_the_tail_is_found(num_bytes: int) -> None:
    data = archive_of(num_bytes)

    for place in range(len(data) - EMPTY_BYTES, len(data)):
        with pytest.raises(CorruptCheckpointError):
            verify_seal(data[:place])


@pytest.mark.parametrize("more", [b"\0", b"x", b" ", b"\n", b"0" * 32, bytes(100), bytes(10_000)])
def test_appended_bytes_are_found(checkpoint: bytes, more: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        verify_seal(checkpoint + more)


@pytest.mark.parametrize("more", [b"\0", b"x" * 10_000])
def test_bytes_in_front_are_found(checkpoint: bytes, more: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        verify_seal(more + checkpoint)


def test_two_checkpoints_in_one_file_are_found(checkpoint: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        verify_seal(checkpoint + checkpoint)


def test_seal_of_another_file_is_found(checkpoint: bytes) -> None:
    other = make_bytes(2)
    start, other_start = (data.rfind(b"PK\x05\x06") for data in (checkpoint, other))

    with pytest.raises(CorruptCheckpointError, match="do not match its digest"):
        verify_seal(checkpoint[:start] + other[other_start:])


def test_zeroed_block_is_found(checkpoint: bytes) -> None:
    data = bytearray(checkpoint)
    data[4096:4608] = bytes(512)

    assert is_damage_found(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"PK\x05\x06" + bytes(18),
        b"trm_dist {} xxh3-128:" + b"0" * 32,
        b"\0\0trm_dist { xxh3-128:" + b"0" * 32,
        b"\0\0trm_dist [] xxh3-128:" + b"0" * 32,
        b"\0\0trm_dist \xff xxh3-128:" + b"0" * 32,
        b"\0\0trm_dist {}" + b"0" * 42,
        bytes(10_000),
    ],
)
def test_bytes_without_a_seal_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        read_seal(data)
    with pytest.raises(CorruptCheckpointError):
        verify_seal(data)


def test_archive_without_a_seal_is_refused() -> None:
    stream = io.BytesIO()
    content: dict[str, Any] = make_state()
    torch.save(content, stream)

    with pytest.raises(CorruptCheckpointError, match="does not end with the seal"):
        verify_seal(stream.getvalue())
