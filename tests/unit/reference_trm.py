"""TRM written for clarity: loops and einsum in float64, from the formulas alone.

B rows, S positions, D width. Weights come from the state dict of the model under test; nothing else
of it is used.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Reference:
    """The same function as the model, one line of the paper at a time."""

    weights: dict[str, Tensor]
    net: str
    depth: int
    heads: int
    prefix: int
    rounds: int  # T
    thoughts: int  # n

    def deep_recursion(self, tokens: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        width = y.shape[-1]
        embedded = self.weights["embedding"][tokens]
        zeros = torch.zeros(len(tokens), self.prefix, width, dtype=torch.float64)
        x = math.sqrt(width) * torch.cat([zeros, embedded], dim=1)
        for _ in range(self.rounds - 1):
            y, z = self.latent_recursion(x, y, z)
            y, z = y.detach(), z.detach()
        y, z = self.latent_recursion(x, y, z)
        logits = torch.einsum("bsd,vd->bsv", y, self.weights["token_head.weight"])
        halt = y[:, 0] @ self.weights["halt_head.weight"][0] + self.weights["halt_head.bias"][0]
        return logits[:, self.prefix :], halt, y, z

    def latent_recursion(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.thoughts):
            z = self.network(x + y + z)
        return self.network(y + z), z

    def network(self, h: Tensor) -> Tensor:
        for number in range(self.depth):
            name = f"blocks.{number}."
            if self.net == "mlp":
                h = h.mT
                h = rms(h + self.swiglu(h, name + "over_positions."))
                h = h.mT
            else:
                h = rms(h + self.attention(h, name + "attention."))
            h = rms(h + self.swiglu(h, name + "over_width."))
        return h

    def swiglu(self, h: Tensor, name: str) -> Tensor:
        both = torch.einsum("bsk,ik->bsi", h, self.weights[name + "gate_up.weight"])
        inner = both.shape[-1] // 2
        gate, up = both[..., :inner], both[..., inner:]
        activated = gate / (1 + torch.exp(-gate)) * up
        return torch.einsum("bsi,ki->bsk", activated, self.weights[name + "down.weight"])

    def attention(self, h: Tensor, name: str) -> Tensor:
        width = h.shape[-1]
        part = width // self.heads
        qkv = torch.einsum("bsd,ed->bse", h, self.weights[name + "qkv.weight"])
        mixed = []
        for head in range(self.heads):
            own = slice(head * part, (head + 1) * part)
            query, key, value = (qkv[..., k * width :][..., own] for k in range(3))
            scores = rotated(query) @ rotated(key).mT / math.sqrt(part)
            mixed.append(torch.softmax(scores, dim=-1) @ value)
        return torch.einsum("bsd,ed->bse", torch.cat(mixed, -1), self.weights[name + "out.weight"])


def rms(h: Tensor) -> Tensor:
    return h / torch.sqrt((h * h).mean(dim=-1, keepdim=True) + 1e-5)


def rotated(h: Tensor) -> Tensor:
    """Each pair (i, i + half) turned by position / 10000^(i / half)."""
    half = h.shape[-1] // 2
    columns = []
    for i in range(half):
        angle = torch.arange(h.shape[1], dtype=torch.float64) / 10_000 ** (i / half)
        # The model's tables are float32.
        cos, sin = angle.cos().float().double(), angle.sin().float().double()
        columns.append((h[..., i] * cos - h[..., i + half] * sin, i))
        columns.append((h[..., i + half] * cos + h[..., i] * sin, i + half))
    return torch.stack([column for column, _ in sorted(columns, key=lambda c: c[1])], dim=-1)


def loss(logits: Tensor, halt: Tensor, labels: Tensor, name: str) -> Tensor:
    """The sum over rows of mean cross-entropy + half the halting loss."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(labels)):
        losses, is_solved = [], True
        for cell in range(labels.shape[1]):
            if labels[row, cell] == -100:
                continue
            v = logits[row, cell]
            strengths = (
                torch.exp(v)
                if name == "softmax"
                else torch.stack([e + 1 if e >= 0 else 1 / (1 - e) for e in v])
            )
            losses.append(-torch.log(strengths[labels[row, cell]] / strengths.sum()))
            is_solved &= bool(v.argmax() == labels[row, cell])
        probability = 1 / (1 + torch.exp(-halt[row]))
        halting = -torch.log(probability if is_solved else 1 - probability)
        total = total + sum(losses) / len(losses) + 0.5 * halting
    return total
