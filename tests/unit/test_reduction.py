"""The sum of the shards' gradients has the same bits whoever computes which shard."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from trm_dist.elastic.reduction import Node, ShardReduction, cover, fold, shards_of, split

SHAPES = [(3, 5), (4,), ()]

WORLDS = range(1, 10)
SHARDS = range(1, 13)


@dataclass
class FakeBucket:
    """A bucket of DDP: gradients of some parameters, as views of one buffer."""

    flat: Tensor
    of: list[nn.Parameter]

    def buffer(self) -> Tensor:
        return self.flat

    def parameters(self) -> list[nn.Parameter]:
        return self.of

    def gradients(self) -> list[Tensor]:
        parts = self.flat.split([each.numel() for each in self.of])
        return [part.view(each.shape) for part, each in zip(parts, self.of, strict=True)]


def make_gradients(num_shards: int) -> list[list[Tensor]]:
    """Return gradients of each shard whose sum depends on the order of additions."""
    generator = torch.Generator().manual_seed(num_shards)
    return [
        [torch.randn(shape, generator=generator) * 10.0 ** (3 * (shard % 5)) for shape in SHAPES]
        for shard in range(num_shards)
    ]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([each.reshape(-1) for each in tensors])


def sum_along_the_tree(gradients: list[list[Tensor]]) -> Tensor:
    leaves = {(shard, shard + 1): flat(each) for shard, each in enumerate(gradients)}
    return fold((0, len(gradients)), leaves.get)


def run_worker(
    rank: int, world_size: int, gradients: list[list[Tensor]], order: list[int]
) -> dict[Node, Tensor]:
    """Return what a worker hands to the exchange: its tree nodes, flat in the bucket's order."""
    dtype = gradients[0][0].dtype
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    reduction = ShardReduction(
        parameters, num_shards=len(gradients), rank=rank, world_size=world_size
    )
    shards = list(reduction.shards)
    for shard in shards[:-1]:
        for parameter, gradient in zip(parameters, gradients[shard], strict=True):
            parameter.grad = gradient.clone()
        reduction.take(shard)
    last = [gradients[shard][number] for shard in shards[-1:] for number in order]
    bucket = FakeBucket(flat(last), [parameters[number] for number in order])
    parts = reduction._local_parts(bucket)  # type: ignore[arg-type]
    return dict(zip(cover((0, len(gradients)), reduction.shards), parts, strict=True))


def nodes_of(world_size: int, num_shards: int) -> list[list[Node]]:
    return [
        cover((0, num_shards), shards_of(rank, world_size, num_shards))
        for rank in range(world_size)
    ]


def all_nodes(node: Node) -> list[Node]:
    if node[1] - node[0] == 1:
        return [node]
    middle = split(node)
    return [node, *all_nodes((node[0], middle)), *all_nodes((middle, node[1]))]


# -- shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", SHARDS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_shards_are_dealt_once_and_in_order(world_size: int, num_shards: int) -> None:
    dealt = [shards_of(rank, world_size, num_shards) for rank in range(world_size)]

    assert [shard for part in dealt for shard in part] == list(range(num_shards))


@pytest.mark.parametrize("num_shards", SHARDS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_shards_are_dealt_evenly(world_size: int, num_shards: int) -> None:
    counts = [len(shards_of(rank, world_size, num_shards)) for rank in range(world_size)]

    assert max(counts) - min(counts) <= 1


# -- the tree --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", SHARDS)
def test_tree_has_every_shard_as_a_leaf(num_shards: int) -> None:
    nodes = all_nodes((0, num_shards))

    leaves = [node for node in nodes if node[1] - node[0] == 1]
    assert leaves == [(shard, shard + 1) for shard in range(num_shards)]
    assert len(nodes) == len(set(nodes)) == 2 * num_shards - 1


@pytest.mark.parametrize("num_shards", SHARDS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_cover_is_the_part_in_order(world_size: int, num_shards: int) -> None:
    for rank, nodes in enumerate(nodes_of(world_size, num_shards)):
        covered = [shard for node in nodes for shard in range(*node)]

        assert covered == list(shards_of(rank, world_size, num_shards))


@pytest.mark.parametrize("num_shards", SHARDS)
def test_cover_is_made_of_the_largest_nodes_inside(num_shards: int) -> None:
    tree = all_nodes((0, num_shards))
    for low in range(num_shards):
        for high in range(low + 1, num_shards + 1):
            inside = [node for node in tree if low <= node[0] and node[1] <= high]
            largest = [
                node
                for node in inside
                if not any(o != node and o[0] <= node[0] and node[1] <= o[1] for o in inside)
            ]

            assert cover((0, num_shards), range(low, high)) == sorted(largest)


@pytest.mark.parametrize("part", [range(0), range(3, 3), range(8, 9)])
def test_cover_of_nothing_is_empty(part: range) -> None:
    assert cover((0, 8), part) == []


@pytest.mark.parametrize(
    ("part", "nodes"),
    [
        (range(8), [(0, 8)]),
        (range(4), [(0, 4)]),
        (range(4, 8), [(4, 8)]),
        (range(3, 5), [(3, 4), (4, 5)]),
        (range(1, 8), [(1, 2), (2, 4), (4, 8)]),
        (range(2, 3), [(2, 3)]),
        (range(2, 6), [(2, 4), (4, 6)]),
    ],
)
def test_cover_of_eight_shards(part: range, nodes: list[Node]) -> None:
    assert cover((0, 8), part) == nodes


# -- the sum ---------------------------------------------------------------------------------------


def test_fold_adds_up_everything() -> None:
    leaves = {(shard, shard + 1): torch.tensor(2.0**shard) for shard in range(7)}

    assert fold((0, 7), leaves.get).item() == 2**7 - 1


def test_fold_takes_a_known_node_as_it_is() -> None:
    known = {(0, 2): torch.tensor(100.0), (2, 3): torch.tensor(1.0), (3, 4): torch.tensor(2.0)}

    assert fold((0, 4), known.get).item() == 103.0


def test_order_of_additions_matters_for_these_gradients() -> None:
    gradients = [flat(each) for each in make_gradients(8)]

    one_by_one = gradients[0].clone()
    for each in gradients[1:]:
        one_by_one += each

    assert not torch.equal(one_by_one, sum_along_the_tree(make_gradients(8)))


@pytest.mark.parametrize("num_shards", SHARDS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_sum_has_the_same_bits_at_every_world_size(world_size: int, num_shards: int) -> None:
    gradients = make_gradients(num_shards)

    known: dict[Node, Tensor] = {}
    for rank in range(min(world_size, num_shards)):
        world = min(world_size, num_shards)
        known |= run_worker(rank, world, gradients, [0, 1, 2])

    assert torch.equal(fold((0, num_shards), known.get), sum_along_the_tree(gradients))


@pytest.mark.parametrize("num_shards", [3, 5, 8, 12])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_sum_does_not_depend_on_the_layout_of_buckets(num_shards: int, order: list[int]) -> None:
    gradients = make_gradients(num_shards)

    known = run_worker(0, 1, gradients, order)

    expected = sum_along_the_tree([[each[number] for number in order] for each in gradients])
    assert torch.equal(known[0, num_shards], expected)


@pytest.mark.parametrize("order", [[0], [2, 1]])
def test_sum_is_made_bucket_by_bucket(order: list[int]) -> None:
    gradients = make_gradients(6)

    known = run_worker(0, 1, gradients, order)

    expected = sum_along_the_tree([[each[number] for number in order] for each in gradients])
    assert torch.equal(known[0, 6], expected)


@pytest.mark.parametrize("num_shards", SHARDS)
def test_hook_of_a_lonely_worker_gives_the_sum(num_shards: int) -> None:
    gradients = make_gradients(num_shards)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    reduction = ShardReduction(parameters, num_shards=num_shards, rank=0, world_size=1)
    for shard in range(num_shards - 1):
        for parameter, gradient in zip(parameters, gradients[shard], strict=True):
            parameter.grad = gradient.clone()
        reduction.take(shard)

    bucket = FakeBucket(flat(gradients[-1]), parameters)
    reduced = reduction.hook(None, bucket).value()  # type: ignore[arg-type]

    assert torch.equal(reduced, sum_along_the_tree(gradients))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shard", range(5))
def test_what_is_not_finite_stays_so(value: float, shard: int) -> None:
    gradients = make_gradients(5)
    gradients[shard][0][1, 2] = value

    total = run_worker(0, 1, gradients, [0, 1, 2])[0, 5]

    assert torch.equal(total[7].isnan(), torch.tensor(math.isnan(value)))
    assert not total[7].isfinite()
    assert total[torch.arange(len(total)) != 7].isfinite().all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_sum_in_half_precision_has_the_same_bits_at_every_world_size(world_size: int) -> None:
    gradients = [[each.bfloat16() for each in shard] for shard in make_gradients(8)]

    known: dict[Node, Tensor] = {}
    for rank in range(world_size):
        known |= run_worker(rank, world_size, gradients, [0, 1, 2])
    total = fold((0, 8), known.get)

    assert total.dtype == torch.bfloat16
    assert torch.equal(total, sum_along_the_tree(gradients))


# -- what is held ----------------------------------------------------------------------------------


def held_after(num_taken: int, num_shards: int) -> list[Node]:
    parameter = nn.Parameter(torch.zeros(2))
    reduction = ShardReduction([parameter], num_shards=num_shards, rank=0, world_size=1)
    for shard in range(num_taken):
        parameter.grad = torch.ones(2)
        reduction.take(shard)
    return [node for node, _ in reduction._held]


@pytest.mark.parametrize(
    ("num_taken", "num_shards", "nodes"),
    [
        (1, 8, [(0, 1)]),
        (2, 8, [(0, 2)]),
        (3, 8, [(0, 2), (2, 3)]),
        (4, 8, [(0, 4)]),
        (7, 8, [(0, 4), (4, 6), (6, 7)]),
        (2, 3, [(0, 1), (1, 2)]),  # three shards split as 1 + 2: these two are no siblings
        (2, 6, [(0, 1), (1, 2)]),
        (3, 6, [(0, 3)]),
        (5, 6, [(0, 3), (3, 4), (4, 5)]),
    ],
)
def test_taken_gradients_are_added_up_when_siblings(
    num_taken: int, num_shards: int, nodes: list[Node]
) -> None:
    assert held_after(num_taken, num_shards) == nodes


@pytest.mark.parametrize("num_shards", [8, 12, 64, 100])
def test_few_gradients_are_held_at_once(num_shards: int) -> None:
    most = max(len(held_after(taken, num_shards)) for taken in range(1, num_shards))

    assert most <= num_shards.bit_length()


def test_take_leaves_no_gradient_on_the_parameters() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    reduction = ShardReduction([parameter], num_shards=2, rank=0, world_size=1)
    parameter.grad = torch.ones(2)

    reduction.take(0)

    assert parameter.grad is None


def test_finish_forgets_what_was_taken() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    reduction = ShardReduction([parameter], num_shards=2, rank=0, world_size=1)
    parameter.grad = torch.full((2,), 100.0)
    reduction.take(0)

    reduction.finish()
    parameter.grad = torch.ones(2)
    reduction.take(0)

    bucket = FakeBucket(torch.ones(2), [parameter])
    assert reduction.hook(None, bucket).value().tolist() == [2.0, 2.0]  # type: ignore[arg-type]


def test_worker_beyond_the_shards_has_none() -> None:
    parameter = nn.Parameter(torch.zeros(2))

    reduction = ShardReduction([parameter], num_shards=2, rank=0, world_size=3)

    assert list(reduction.shards) == []
