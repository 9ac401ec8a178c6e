"""A snapshot gives back every bit of a state, and shares no memory with it."""

import io
import json
import math
import struct
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fakes import make_state
from trm_dist.checkpoint.manager import Snapshots
from trm_dist.checkpoint.memory import private_slots
from trm_dist.checkpoint.snapshot import Flat, unflatten
from trm_dist.checkpoint.state import digest

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


class Text(str):
    """As torch.__version__ is one."""


class Snapshot:
    """A header and a buffer, as a slot is one."""

    def __init__(self) -> None:
        self.header = b""
        self.buffer = bytearray()

    def capture(self, tree: dict[str, Any]) -> None:
        flat = Flat(tree)
        if len(self.buffer) != flat.num_bytes:
            self.buffer = bytearray(flat.num_bytes)
        flat.copy_to(memoryview(self.buffer))
        self.header = flat.header

    def tree(self) -> dict[str, Any]:
        return unflatten(self.header, memoryview(self.buffer))


def through(tree: dict[str, Any]) -> dict[str, Any]:
    snapshot = Snapshot()
    snapshot.capture(tree)
    return snapshot.tree()


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def saved_size(content: object) -> int:
    stream = io.BytesIO()
    torch.save(content, stream)
    return len(stream.getvalue())


# -- plain values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -(2**70),
        "",
        'Кіт "中"\n\\\0',
        0.1,
        -0.0,
        5e-324,
        math.inf,
        -math.inf,
        [],
        (),
        {},
        [1, [2.5, (3, None)], ("a", [True])],
        {"a": {"b": {}}, "$": "tensor", "items": [1], "at": 0},
        {0: "zero", 7: {"x": (0.9, 0.95)}},
        {"$": {"$": [{"$": "dict"}]}},
    ],
)
def test_plain_value_comes_back_as_it_was(value: object) -> None:
    assert repr(through({"value": value})["value"]) == repr(value)


@pytest.mark.parametrize("value", [0.1, 1 / 3, math.pi * 1e300, 5e-324, -0.0, math.inf])
def test_float_comes_back_with_its_exact_bits(value: float) -> None:
    back = through({"value": value})["value"]

    assert struct.pack("d", back) == struct.pack("d", value)


def test_nan_comes_back() -> None:
    assert math.isnan(through({"value": math.nan})["value"])


@pytest.mark.parametrize("key", [0, 7, "0", "", "a.b"])
def test_key_comes_back_with_its_type(key: object) -> None:
    (back,) = through({"inner": {key: 1}})["inner"]

    assert back == key
    assert type(back) is type(key)


def test_order_of_keys_comes_back() -> None:
    tree = {"b": 1, "a": 2, "c": {"z": 1, "y": 2}}

    back = through(tree)

    assert [*back, *back["c"]] == ["b", "a", "c", "z", "y"]


def test_subclass_of_text_comes_back_as_plain_text() -> None:
    back = through({"torch": Text("2.13.0")})["torch"]

    assert type(back) is str


def test_ordered_dict_comes_back_as_plain_dict() -> None:
    assert type(through({"model": OrderedDict(a=1)})["model"]) is dict


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", 1j, object(), torch.float32, int])
def test_value_of_unknown_type_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="a snapshot holds tensors and plain values"):
        Snapshot().capture({"inner": [value]})


def test_refused_capture_leaves_the_one_before() -> None:
    snapshot = Snapshot()
    snapshot.capture({"weight": torch.ones(3)})

    with pytest.raises(TypeError):
        snapshot.capture({"weight": torch.zeros(3), "other": {1}})

    assert snapshot.tree()["weight"].tolist() == [1.0, 1.0, 1.0]


# -- tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (3, 0, 2)], ids=str)
def test_tensor_comes_back_with_type_shape_and_bits(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)

    back = through({"before": torch.ones(1, dtype=torch.bool), "tensor": tensor})["tensor"]

    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bits(back) == bits(tensor)


def test_special_numbers_in_a_tensor_come_back_with_their_bits() -> None:
    patterns = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 1, 0x7FA00000]).int()
    tensor = patterns.view(torch.float32)

    assert bits(through({"tensor": tensor})["tensor"]) == bits(tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[::3],
        torch.arange(3.0).expand(4, 3),
        nn.Parameter(torch.arange(3.0)),
        torch.arange(3.0, requires_grad=True) * 2,
    ],
    ids=["transposed", "strided", "expanded", "parameter", "with history"],
)
def test_tensor_of_any_kind_comes_back_plain(tensor: Tensor) -> None:
    back = through({"tensor": tensor})["tensor"]

    assert torch.equal(back, tensor.detach())
    assert back.is_contiguous()
    assert not back.requires_grad


def test_state_of_a_checkpoint_comes_back() -> None:
    state = make_state(7)

    back = through(state)

    assert digest(back) == digest(state)
    assert back["config"] == state["config"]


def test_tree_of_no_tensors_comes_back() -> None:
    assert through({}) == {}


# -- memory ----------------------------------------------------------------------------------------


def test_change_after_capture_does_not_reach_the_snapshot() -> None:
    tree = {"weight": torch.ones(3), "groups": [{"lr": 0.1}]}
    snapshot = Snapshot()
    snapshot.capture(tree)

    tree["weight"].zero_()
    tree["groups"][0]["lr"] = 0.2

    assert snapshot.tree()["weight"].tolist() == [1.0, 1.0, 1.0]
    assert snapshot.tree()["groups"] == [{"lr": 0.1}]


def test_capture_does_not_change_the_tree() -> None:
    tree = {"weight": torch.ones(3), "groups": ({"lr": 0.1},)}

    through(tree)

    assert tree["weight"].tolist() == [1.0, 1.0, 1.0]
    assert tree["groups"] == ({"lr": 0.1},)


def test_buffer_is_used_again_for_the_same_layout() -> None:
    snapshot = Snapshot()
    snapshot.capture(make_state(1))
    before = snapshot.tree()["model_state_dict"]["mix.weight"].data_ptr()

    snapshot.capture(make_state(2))

    assert snapshot.tree()["model_state_dict"]["mix.weight"].data_ptr() == before
    assert digest(snapshot.tree()) == digest(make_state(2))


@pytest.mark.parametrize("sizes", [(10, 1000), (1000, 10), (0, 5), (5, 0)])
def test_capture_of_another_size_replaces_the_one_before(sizes: tuple[int, int]) -> None:
    snapshot = Snapshot()
    snapshot.capture({"weight": torch.zeros(sizes[0])})

    snapshot.capture({"weight": torch.ones(sizes[1])})

    assert torch.equal(snapshot.tree()["weight"], torch.ones(sizes[1]))


def test_buffer_is_about_as_large_as_the_tensors() -> None:
    snapshot = Snapshot()

    snapshot.capture({"a": torch.zeros(1000), "b": torch.zeros(3, dtype=torch.bool)})

    assert 4003 <= len(snapshot.buffer) <= 4003 + 2 * 64


def test_snapshot_is_read_from_header_and_buffer_alone() -> None:
    state, other = make_state(3), Snapshot()
    snapshot = Snapshot()
    snapshot.capture(state)

    other.header, other.buffer = bytes(snapshot.header), snapshot.buffer.copy()

    assert digest(other.tree()) == digest(state)


def test_header_is_json() -> None:
    snapshot = Snapshot()
    snapshot.capture({"weight": torch.ones(3), "lr": 0.1})

    assert json.loads(snapshot.header)["tensors"] == [["torch.float32", [3], 0]]


# -- one after another -----------------------------------------------------------------------------

ONE = {"a": torch.ones(2, 3), "b": torch.zeros(4), "c": 1}


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.full((2, 3), 2.0), "b": torch.full((4,), 3.0), "c": 2},
        {"a": torch.full((3, 2), 2.0), "b": torch.full((4,), 3.0)},
        {"a": torch.full((2, 3), 2).int(), "b": torch.full((4,), 3.0)},
        {"a": torch.full((2, 3), 2.0)},
        {"a": torch.full((2, 3), 2.0), "b": torch.zeros(4), "d": torch.full((1,), 3.0)},
        {"x": [torch.full((2, 3), 2.0)], "y": (torch.full((4,), 3.0), None)},
        {"b": torch.full((4,), 3.0), "a": torch.full((2, 3), 2.0)},
        {},
    ],
    ids=["values", "shape", "type", "fewer", "more", "names", "order", "none"],
)
def test_snapshots_of_other_trees_follow_one_another(other: dict[str, Any]) -> None:
    slots = private_slots(num_slots=2, header_bytes=4096, body_bytes=4096)
    snapshots = Snapshots(slots)

    for tree in (ONE, ONE, other, other, ONE, ONE):
        snapshots.capture(tree)

        newest = slots.newest()
        assert newest is not None
        # repr: with types, and with every value of a tensor.
        assert repr(unflatten(newest.header, newest.body)) == repr(tree)


def test_layout_is_used_again_for_tensors_that_are_alike() -> None:
    first = Flat(make_state(1))

    again = Flat(make_state(2), first.layout)

    assert again.layout is first.layout
    assert json.loads(again.header)["tensors"] == json.loads(first.header)["tensors"]


# -- saving ----------------------------------------------------------------------------------------


def test_each_tensor_is_saved_alone() -> None:
    tree = through({"large": torch.zeros(100_000), "small": torch.zeros(10)})

    assert saved_size(tree["small"]) < 3_000


def test_whole_tree_is_saved_once() -> None:
    tree = {str(number): torch.full((10_000,), number) for number in range(5)}

    assert saved_size(through(tree)) < 1.05 * saved_size(tree)


def test_tensors_of_mixed_types_are_saved_together() -> None:
    tree = through({str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES})
    stream = io.BytesIO()
    torch.save(tree, stream)
    stream.seek(0)

    back = torch.load(stream)

    assert [each.dtype for each in back.values()] == DTYPES
    assert all(each.tolist() == [1, 1, 1] for each in back.values())


@pytest.mark.parametrize(
    "tree", [{"a": torch.zeros(2, dtype=torch.complex64)}, {"a": {(1, 2): 3}}], ids=["type", "key"]
)
def test_what_a_snapshot_cannot_hold_is_refused_and_the_last_one_stands(
    tree: dict[str, Any],
) -> None:
    snapshot = Snapshot()
    snapshot.capture({"a": 1})
    with pytest.raises(TypeError):
        snapshot.capture(tree)
    assert snapshot.tree() == {"a": 1}
