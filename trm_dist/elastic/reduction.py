"""Gradients of shards, added up in an order that belongs to the shards and not to the workers.

The global batch is cut into a fixed number of shards. Their gradients are the leaves of a fixed
binary tree, and the sum of the batch is the sum along that tree, whoever computes which part: the
bits do not depend on the world size. A worker adds up what it can alone (siblings, like a binary
counter, so it holds about log2(shards) gradients), and hands its tree nodes to DDP's communication
hook, which exchanges them bucket by bucket.

Two workers with one node each need one addition, which commutes: a plain all-reduce. Otherwise each
worker owns a slice of every bucket, receives that slice of every node, adds up along the tree, and
sends the result back.

What carries them changes no bit: gloo, through host memory where gradients are a GPU's, or NCCL.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Reduced = torch.futures.Future[Tensor]


@dataclass(frozen=True, slots=True)
class Carrier:
    """What exchanges gradients."""

    group: dist.ProcessGroup | None
    """None: the default group, which is gloo's."""
    device: torch.device
    """Whose memory it reads and writes."""


OVER_GLOO = Carrier(None, torch.device("cpu"))

Node = tuple[int, int]
"""The shards [low, high) below a node of the tree."""


def shards_of(rank: int, world_size: int, num_shards: int) -> range:
    """Return the shards a worker computes; empty for workers beyond the shards."""
    return range(rank * num_shards // world_size, (rank + 1) * num_shards // world_size)


def split(node: Node) -> int:
    """Return where a node's two children meet; this alone fixes the shape of the tree."""
    return (node[0] + node[1]) // 2


def cover(node: Node, part: range) -> list[Node]:
    """Return the largest nodes at or below `node` that lie within `part`, from left to right."""
    low, high = node
    if part.stop <= low or high <= part.start:
        return []
    if part.start <= low and high <= part.stop:
        return [node]
    middle = split(node)
    return cover((low, middle), part) + cover((middle, high), part)


def fold(node: Node, known: Callable[[Node], Tensor | None]) -> Tensor:
    """Add up a node from the nodes that are known, in the order of the tree."""
    value = known(node)
    if value is not None:
        return value
    middle = split(node)
    return fold((node[0], middle), known) + fold((middle, node[1]), known)


class ShardReduction:
    """Collects this worker's shard gradients and completes the sum inside DDP's hook.

    For every optimizer step: after the backward of each local shard but the last, under
    `no_sync()`, call `take`; run the last one as a normal DDP backward, whose hook adds what was
    taken and exchanges; then every `p.grad` is the sum over all shards. A worker without shards
    runs any backward, so that its hook takes part; its gradient counts nowhere.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, num_shards: int, rank: int, world_size: int,
        carrier: Carrier = OVER_GLOO, is_reused: bool = False,
    ) -> None:  # fmt: skip
        """Prepare for one place in the group.

        Args:
            parameters: Of the module, in its order.
            num_shards: Of a batch.
            rank: Of this worker.
            world_size: Workers.
            carrier: What exchanges the gradients.
            is_reused: Whether each backward writes to the memory of the gradients before it.
        """
        self._parameters = list(parameters)
        self._carrier, self._is_reused = carrier, is_reused
        self._root: Node = (0, num_shards)
        self._rank = rank
        self.shards = shards_of(rank, world_size, num_shards)
        self._nodes = [
            cover(self._root, shards_of(each, world_size, num_shards)) for each in range(world_size)
        ]
        self._held: list[tuple[Node, list[Tensor]]] = []
        self._index: dict[Tensor, int] = {each: at for at, each in enumerate(self._parameters)}

    def take(self, shard: int) -> None:
        """Take the gradients of a shard away from the parameters, and add up siblings."""
        gradients = []
        for parameter in self._parameters:
            assert parameter.grad is not None, "every parameter has a gradient in every shard"
            gradients.append(parameter.grad.clone() if self._is_reused else parameter.grad)
            parameter.grad = None
        node = (shard, shard + 1)
        while self._held and self._are_siblings(self._held[-1][0], node):
            left, sums = self._held.pop()
            torch._foreach_add_(sums, gradients)
            node, gradients = (left[0], node[1]), sums
        self._held.append((node, gradients))

    def finish(self) -> None:
        """Forget what was taken; after the last backward of an optimizer step."""
        self._held.clear()

    def hook(self, _state: object, bucket: dist.GradBucket) -> Reduced:
        """Complete one bucket: DDP's communication hook."""
        buffer = bucket.buffer()
        parts = self._local_parts(bucket)
        if len(self._nodes) == 1:
            return _done(buffer)
        carried = [part.to(self._carrier.device) for part in parts]
        is_near = buffer.device == self._carrier.device
        total = buffer if is_near else carried[-1] if carried else buffer.cpu()
        if len(self._nodes) == 2 and all(len(nodes) == 1 for nodes in self._nodes):
            work = dist.all_reduce(total, group=self._carrier.group, async_op=True)
            if is_near:
                reduced: Reduced = work.get_future().then(lambda future: future.value()[0])
                return reduced
            work.wait()
        else:
            self._exchange(total, carried)
        return _done(total if is_near else buffer.copy_(total))

    def _local_parts(self, bucket: dist.GradBucket) -> list[Tensor]:
        """Return this worker's nodes as flat tensors of a bucket; the last one is its buffer."""
        if not self.shards:
            return []
        views = bucket.gradients()
        numbers = [self._index[parameter] for parameter in bucket.parameters()]
        held = [(node, [sums[number] for number in numbers]) for node, sums in self._held]
        node = (self.shards[-1], self.shards.stop)
        while held and self._are_siblings(held[-1][0], node):
            left, sums = held.pop()
            torch._foreach_add_(views, sums)  # a + b has the bits of b + a
            node = (left[0], node[1])
        assert [*(each for each, _ in held), node] == self._nodes[self._rank]
        return [torch.cat([part.reshape(-1) for part in sums]) for _, sums in held] + [
            bucket.buffer()
        ]

    def _are_siblings(self, left: Node, right: Node) -> bool:
        both = (left[0], right[1])
        covering = cover(self._root, range(*both))
        return covering == [both] and split(both) == left[1]

    def _exchange(self, buffer: Tensor, parts: Sequence[Tensor]) -> None:
        """Send every node's slices to their owners, add up the own slice, send it back."""
        size, me, length = len(self._nodes), self._rank, buffer.numel()
        cuts = [length * rank // size for rank in range(size + 1)]
        own = slice(cuts[me], cuts[me + 1])
        peers = [(me + step) % size for step in range(1, size)]
        known = {node: part[own] for node, part in zip(self._nodes[me], parts, strict=True)}
        transfers = []
        for peer in peers:
            for node in self._nodes[peer]:
                known[node] = buffer.new_empty(own.stop - own.start)
                transfers.append(self._transfer(dist.irecv, known[node], peer, node[0]))
        for peer in peers:
            there = slice(cuts[peer], cuts[peer + 1])
            for node, part in zip(self._nodes[me], parts, strict=True):
                transfers.append(self._transfer(dist.isend, part[there], peer, node[0]))
        _make(transfers)
        buffer[own] = fold(self._root, known.get)
        returns = self._root[1]  # tags above every shard's
        transfers = []
        for peer in peers:
            there = slice(cuts[peer], cuts[peer + 1])
            transfers.append(self._transfer(dist.irecv, buffer[there], peer, returns + peer))
            transfers.append(self._transfer(dist.isend, buffer[own], peer, returns + me))
        _make(transfers)

    def _transfer(
        self, direction: Callable[..., Any], tensor: Tensor, peer: int, tag: int
    ) -> dist.P2POp:
        # NCCL knows no tags: both ends list what goes between two workers in the same order.
        return dist.P2POp(direction, tensor, peer, self._carrier.group, tag)


def _make(transfers: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(transfers):
        work.wait()


def _done(value: Tensor) -> Reduced:
    future: Reduced = Reduced(devices=[value.device] if value.is_cuda else None)
    future.set_result(value)
    return future
