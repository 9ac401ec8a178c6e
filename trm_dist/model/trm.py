"""TRM: one small network that refines a latent and an answer, over and over.

Shapes: B rows, L cells, P prefix positions, S = P + L positions, D width, V tokens.
Formulas use the paper's letters: x the question, y the output (the answer so far), z the latent.

Source: arXiv 2510.04871, the pseudocode and section 4; differences are listed in the README.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trm_dist.model.layers import AttentionBlock, Linear, MixerBlock, truncated_normal, widened
from trm_dist.randomness import derive_key

Precision = Literal["fp32", "bf16"]

HALT_BIAS = -5.0
"""The halting logit starts far below zero: nothing halts before it has learned when."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a TRM; together with the seed they fix every weight at the start."""

    net: Literal["mlp", "attn"]
    dim: int
    depth: int
    heads: int
    seq_len: int
    prefix_len: int
    num_tokens: int
    expansion: float
    h_cycles: int
    l_cycles: int

    @property
    def multiple(self) -> int:
        """What inner widths are rounded up to: 256 as in the paper, 32 where it would dominate."""
        return 256 if self.dim >= 512 else 32


class Trm(nn.Module):
    """Embedding, the recursive network, and the heads for tokens and for halting."""

    output_init: Tensor
    latent_init: Tensor

    def __init__(self, shape: Shape, *, seed: int, precision: Precision = "fp32") -> None:
        """Make a model with the weights of a seed.

        Args:
            shape: Its sizes.
            seed: Of the weights.
            precision: Of the activations; weights are float32.
        """
        super().__init__()
        self._is_bf16 = precision == "bf16"
        generator = torch.Generator().manual_seed(derive_key("weights", seed) >> 1)
        dim = shape.dim
        self.shape = shape
        self.embedding = nn.Parameter(
            truncated_normal((shape.num_tokens, dim), dim**-0.5, generator)
        )
        self.blocks = nn.ModuleList(_block(shape, generator) for _ in range(shape.depth))
        self.token_head = Linear(dim, shape.num_tokens, generator)
        # Two logits as in the public code, halt and continue; only the first is read.
        self.halt_head = nn.Linear(dim, 2)
        nn.init.zeros_(self.halt_head.weight)
        nn.init.constant_(self.halt_head.bias, HALT_BIAS)
        self.register_buffer("output_init", truncated_normal((dim,), 1.0, generator))
        self.register_buffer("latent_init", truncated_normal((dim,), 1.0, generator))

    def start(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return the first output y0 and latent z0, both [B, S, D]."""
        size = (num_rows, self.shape.prefix_len + self.shape.seq_len, self.shape.dim)
        return self._cast(self.output_init).expand(size), self._cast(self.latent_init).expand(size)

    def forward(
        self, tokens: Tensor, output: Tensor, latent: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Refine once, deeply: T - 1 rounds without gradient, one round with.

        Args:
            tokens: The question, int64 [B, L].
            output: y, [B, S, D], without gradient.
            latent: z, [B, S, D], without gradient.

        Returns:
            Token logits [B, L, V] and halting logits [B] in float32, and the new y and z, detached.
        """
        x = self._embed(tokens)
        with torch.no_grad():
            for _ in range(self.shape.h_cycles - 1):
                output, latent = self._refine(x, output, latent)
        output, latent = self._refine(x, output, latent)
        logits = widened(self.token_head(output[:, self.shape.prefix_len :]))
        halt = self.halt_head(widened(output[:, 0]))[:, 0]
        return logits, halt, output.detach(), latent.detach()

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self._cast(F.embedding(tokens, self.embedding) * self.shape.dim**0.5)
        return F.pad(x, (0, 0, self.shape.prefix_len, 0)) if self.shape.prefix_len else x

    def _cast(self, x: Tensor) -> Tensor:
        """Return an activation in the precision of activations."""
        return x.bfloat16() if self._is_bf16 else x

    def _refine(self, x: Tensor, output: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Think n times with the question in sight, then answer once without it."""
        for _ in range(self.shape.l_cycles):
            latent = self._network(latent + (output + x))
        return self._network(output + latent), latent

    def _network(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def num_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _block(shape: Shape, generator: torch.Generator) -> nn.Module:
    positions = shape.prefix_len + shape.seq_len
    sizes: dict[str, Any] = {"expansion": shape.expansion, "multiple": shape.multiple}
    if shape.net == "mlp":
        return MixerBlock(positions, shape.dim, **sizes, generator=generator)
    return AttentionBlock(positions, shape.dim, heads=shape.heads, **sizes, generator=generator)
