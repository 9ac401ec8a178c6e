"""A checkpoint's content: to bytes and back, never running what it carries, and its digest."""

import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fakes import (
    make_bytes,
    make_state,
    make_summary,
    small_archive,
    to_bytes,
    torch_saved,
)
from trm_dist.checkpoint.names import FINAL, LATEST, epoch_name
from trm_dist.checkpoint.seal import seal, verify_seal
from trm_dist.checkpoint.state import (
    FORMAT_VERSION,
    KEYS,
    digest,
    find_damage,
    from_bytes,
)
from trm_dist.errors import CorruptCheckpointError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint_v1.pt"
"""Written once, by the first version of the format: make_bytes(7)."""
FIXTURE_DIGEST = "9644e49ba4c57d9cc3b67a10a9d8e74098a23319de77a309a164d662a0e1d6d3"

SECTIONS = ["model_state_dict", "ema_state_dict", "optimizer_state_dict"]


class Bomb:
    """Whoever unpickles it makes a directory."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._marker,)


def raw_torch_saved(content: object) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)


def sealed_pickle(bomb: Bomb) -> bytes:
    """A plain pickle in front of an empty zip, sealed: unpickling stops before the zip begins."""
    stream = io.BytesIO(pickle.dumps(bomb))
    with zipfile.ZipFile(stream, "a"):
        pass
    return b"".join(seal([stream.getvalue()], make_summary()))


BOMBS = {
    "pickle": pickle.dumps,
    "torch.save": lambda bomb: raw_torch_saved({"epoch": bomb}).getvalue(),
    "sealed": lambda bomb: torch_saved({"epoch": bomb}, make_summary()),
    "sealed state": lambda bomb: torch_saved(make_state(config=bomb), make_summary()),
    "sealed pickle": sealed_pickle,
}


# -- to bytes and back -----------------------------------------------------------------------------


def test_state_comes_back_from_its_bytes() -> None:
    state = make_state(7)

    back = from_bytes(to_bytes(state)[0])

    assert digest(back) == digest(state)
    plain = KEYS - set(SECTIONS)
    assert {key: back[key] for key in plain} == {key: state[key] for key in plain}


def test_summary_is_the_one_in_the_seal() -> None:
    data, summary = to_bytes(make_state(7))

    assert verify_seal(data).summary == summary == make_summary(7)


def test_file_is_loaded_by_a_bare_torch_load(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pt"
    path.write_bytes(make_bytes(7))

    back = torch.load(path)

    assert back.keys() == KEYS
    assert digest(back) == digest(make_state(7))


def test_bytes_after_verification_are_left_unchanged() -> None:
    data = make_bytes(7)

    from_bytes(memoryview(data))

    assert data == make_bytes(7)


def test_key_of_a_later_minor_version_is_no_obstacle() -> None:
    state = make_state(7)

    back = from_bytes(to_bytes(state | {"new_key": 1})[0])

    assert digest(back) == digest(state)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOMBS)
def test_malicious_file_is_refused_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    data = BOMBS[kind](Bomb(tmp_path / "marker"))

    with pytest.raises(CorruptCheckpointError):
        from_bytes(data)

    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", BOMBS)
def test_malicious_file_is_a_real_threat(kind: str, tmp_path: Path) -> None:
    data = BOMBS[kind](Bomb(tmp_path / "marker"))

    with suppress(RuntimeError):  # what torch says when the bomb has gone off
        torch.load(io.BytesIO(data), weights_only=False)

    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", BOMBS)
def test_search_for_damage_runs_nothing(kind: str, tmp_path: Path) -> None:
    data = BOMBS[kind](Bomb(tmp_path / "marker"))

    assert find_damage(data, LATEST) != []

    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content", [{}, [], 1, "text", torch.ones(3), {"model_state_dict": {}}, {"epoch": 1}, None]
)
def test_other_content_of_torch_save_is_refused(content: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="does not hold a training state"):
        from_bytes(torch_saved(content, make_summary()))


@pytest.mark.parametrize("missing", sorted(KEYS))
def test_state_without_one_of_its_keys_is_refused(missing: str) -> None:
    content = {key: value for key, value in make_state().items() if key != missing}

    with pytest.raises(CorruptCheckpointError, match="does not hold a training state"):
        from_bytes(torch_saved(content, make_summary()))


def test_archive_that_torch_cannot_read_is_refused() -> None:
    with pytest.raises(CorruptCheckpointError, match=r"it cannot be loaded"):
        from_bytes(small_archive(make_summary()))


def test_state_without_a_seal_is_refused() -> None:
    with pytest.raises(CorruptCheckpointError, match="does not end with the seal"):
        from_bytes(raw_torch_saved(make_state()).getvalue())


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
def test_newer_format_is_refused_with_advice(version: int) -> None:
    data = make_bytes(format_version=version)

    with pytest.raises(CorruptCheckpointError, match=rf"{version} is newer .* update trm_dist"):
        from_bytes(data)


# -- the stored file -------------------------------------------------------------------------------


def test_stored_file_of_format_1_still_loads() -> None:
    state = from_bytes(FIXTURE.read_bytes())

    assert digest(state) == FIXTURE_DIGEST
    assert (state["format_version"], state["epoch"], state["batch_count"]) == (1, 1, 7)


def test_stored_file_of_format_1_is_found_good() -> None:
    assert find_damage(FIXTURE.read_bytes(), epoch_name(1, 7)) == []


# -- the digest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", SECTIONS)
def test_digest_changes_with_every_tensor(section: str) -> None:
    state = make_state()
    digests = {digest(state)}
    count = len(list(tensors(state[section])))

    for number in range(count):
        changed = make_state()
        list(tensors(changed[section]))[number].view(-1)[-1] += 1
        digests.add(digest(changed))

    assert count >= 3
    assert len(digests) == 1 + count


@pytest.mark.parametrize("section", SECTIONS)
def test_digest_sees_a_single_bit(section: str) -> None:
    state, changed = make_state(), make_state()

    next(tensors(changed[section])).view(-1).view(torch.uint8)[0] ^= 1

    assert digest(changed) != digest(state)


@pytest.mark.parametrize("key", sorted(KEYS - set(SECTIONS)))
def test_digest_does_not_see_anything_else(key: str) -> None:
    state = make_state()

    assert digest(state | {key: "another"}) == digest(state)


def test_digest_sees_under_which_name_a_tensor_stands() -> None:
    state, changed = make_state(), make_state()
    weights = changed["model_state_dict"]

    weights["other.weight"] = weights.pop("mix.weight")

    assert digest(changed) != digest(state)


@pytest.mark.parametrize("other", [torch.zeros(2, 3), torch.zeros(6).int()])
def test_digest_sees_shape_and_type(other: Tensor) -> None:
    state, changed = make_state(), make_state()
    state["model_state_dict"] = {"a": torch.zeros(6)}
    changed["model_state_dict"] = {"a": other}

    assert digest(changed) != digest(state)


def test_digest_sees_in_which_section_a_tensor_stands() -> None:
    state, changed = make_state(), make_state()

    model, average = changed["model_state_dict"], changed["ema_state_dict"]["weights"]
    changed["model_state_dict"], changed["ema_state_dict"]["weights"] = average, model

    assert digest(changed) != digest(state)


def test_digest_does_not_depend_on_order_or_memory_layout() -> None:
    state, changed = make_state(), make_state()

    items = reversed(changed["model_state_dict"].items())
    changed["model_state_dict"] = {name: each.t().clone().t() for name, each in items}

    assert digest(changed) == digest(state)


def test_digest_takes_empty_tensors_and_scalars() -> None:
    state, changed = make_state(), make_state()
    state["model_state_dict"] = {"a": torch.zeros(0), "b": torch.tensor(1.0)}
    changed["model_state_dict"] = {"a": torch.zeros(0), "b": torch.tensor(2.0)}

    assert digest(changed) != digest(state)


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LATEST, FINAL, epoch_name(1, 7), "copy.pt"])
def test_good_checkpoint_has_no_damage(name: str) -> None:
    assert find_damage(make_bytes(7), name) == []


@pytest.mark.parametrize("name", [epoch_name(1, 8), epoch_name(2, 7), epoch_name(7, 1)])
def test_name_of_other_counters_is_damage(name: str) -> None:
    assert find_damage(make_bytes(7), name) == ["its name does not say epoch 1 batch 7"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("section", SECTIONS)
def test_weight_that_is_not_finite_is_damage(section: str, value: float) -> None:
    state = make_state(7)
    next(tensors(state[section])).view(-1)[0] = value

    (found,) = find_damage(to_bytes(state)[0], LATEST)

    assert found.startswith(f"{section}.")
    assert found.endswith("holds values that are not finite")


@pytest.mark.parametrize(
    "counter", ["epoch", "batch_idx", "batch_count", "global_step", "samples_seen"]
)
def test_seal_that_does_not_match_the_content_is_damage(counter: str) -> None:
    summary = make_summary(7)
    true = summary[counter]

    found = find_damage(to_bytes(make_state(7), summary | {counter: 99})[0], LATEST)

    assert found == [f"its seal says {counter}=99 and its content {true}"]


def test_record_with_a_wrong_crc_is_damage() -> None:
    stream = raw_torch_saved(make_state(7))
    weight = make_state(7)["model_state_dict"]["mix.weight"].numpy().tobytes()
    stream.getbuffer()[stream.getvalue().index(weight)] ^= 1

    (found,) = find_damage(b"".join(seal([stream.getvalue()], make_summary(7))), LATEST)

    assert "CRC" in found


def test_all_damage_is_named_at_once() -> None:
    state = make_state(7)
    for section in SECTIONS:
        next(tensors(state[section])).view(-1)[0] = float("nan")

    assert len(find_damage(to_bytes(state)[0], epoch_name(1, 8))) == 4


@pytest.mark.parametrize("data", [b"", b"torn", bytes(10_000), make_bytes(7)[:-1]])
def test_torn_checkpoint_is_damage(data: bytes) -> None:
    assert len(find_damage(data, LATEST)) == 1
