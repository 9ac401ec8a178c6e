"""TRM: one small network that refines a latent and an answer, over and over.

Shapes: B rows, L cells, P prefix positions, S = P + L positions, D width, V tokens, E length of a
puzzle's vector, at most P D.
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
    puzzle_emb_ndim: int = 0
    """E: length of a puzzle's vector, which fills the first prefix positions; 0: none."""
    num_puzzles: int = 1

    @property
    def multiple(self) -> int:
        """What inner widths are rounded up to: 256 as in the paper, 32 where it would dominate."""
        return 256 if self.dim >= 512 else 32


class Trm(nn.Module):
    """Embedding, the recursive network, and the heads for tokens and for halting."""

    output_init: Tensor
    latent_init: Tensor
    puzzle_embedding: Tensor
    """Vectors of all puzzles, [puzzles, E]; no parameter, as it has an optimizer of its own."""

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
        # Mixing positions is one product where they come first in memory. In bfloat16 that is the
        # faster way; in float32 products row by row are, as they stay in the cache.
        self._positions_first = self._is_bf16 and shape.net == "mlp"
        self.embedding = nn.Parameter(
            truncated_normal((shape.num_tokens, dim), dim**-0.5, generator)
        )
        self.blocks = nn.ModuleList(
            _block(shape, generator, positions_first=self._positions_first)
            for _ in range(shape.depth)
        )
        self.token_head = Linear(dim, shape.num_tokens, generator)
        # Two logits as in the public code, halt and continue; only the first is read.
        self.halt_head = nn.Linear(dim, 2)
        nn.init.zeros_(self.halt_head.weight)
        nn.init.constant_(self.halt_head.bias, HALT_BIAS)
        self.register_buffer("output_init", truncated_normal((dim,), 1.0, generator))
        self.register_buffer("latent_init", truncated_normal((dim,), 1.0, generator))
        if shape.puzzle_emb_ndim:
            vectors = torch.zeros(shape.num_puzzles, shape.puzzle_emb_ndim)
            self.register_buffer("puzzle_embedding", vectors)

    def start(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return the first output y0 and latent z0, both [B, S, D]."""
        size = (num_rows, self.shape.prefix_len + self.shape.seq_len, self.shape.dim)
        return self._cast(self.output_init).expand(size), self._cast(self.latent_init).expand(size)

    def vectors_of(self, puzzles: Tensor | None, num_rows: int) -> Tensor | None:
        """Return the vectors of some puzzles, [B, E], as leaves; None: the model has none.

        Args:
            puzzles: int64 [B]; None: the first one for all rows.
            num_rows: B.
        """
        if not self.shape.puzzle_emb_ndim:
            return None
        if puzzles is None:
            puzzles = self.puzzle_embedding.new_zeros(num_rows, dtype=torch.int64)
        return self.puzzle_embedding[puzzles].requires_grad_(torch.is_grad_enabled())

    def forward(
        self, tokens: Tensor, output: Tensor, latent: Tensor, vectors: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Refine once, deeply: T - 1 rounds without gradient, one round with.

        Args:
            tokens: The question, int64 [B, L].
            output: y, [B, S, D], without gradient.
            latent: z, [B, S, D], without gradient.
            vectors: Of the rows' puzzles, [B, E], from `vectors_of`.

        Returns:
            Token logits [B, L, V] and halting logits [B] in float32, and the new y and z, detached.
        """
        x = self._embed(tokens, vectors)
        with torch.no_grad():
            for _ in range(self.shape.h_cycles - 1):
                output, latent = self._refine(x, output, latent)
        output, latent = self._refine(x, output, latent)
        logits = widened(self.token_head(output[:, self.shape.prefix_len :]))
        halt = self.halt_head(widened(output[:, 0]))[:, 0]
        return logits, halt, output.detach(), latent.detach()

    def _embed(self, tokens: Tensor, vectors: Tensor | None) -> Tensor:
        prefix_len, dim = self.shape.prefix_len, self.shape.dim
        x = self._cast(F.embedding(tokens, self.embedding) * dim**0.5)
        if vectors is None:
            x = F.pad(x, (0, 0, prefix_len, 0)) if prefix_len else x
        else:
            filled = F.pad(vectors * dim**0.5, (0, prefix_len * dim - self.shape.puzzle_emb_ndim))
            x = torch.cat([self._cast(filled).view(-1, prefix_len, dim), x], dim=1)
        # Whatever is added to it or made of it keeps its order in memory.
        return self._turned(self._turned(x).contiguous())

    def _turned(self, x: Tensor) -> Tensor:
        """Turn [B, S, D] into the order of axes that the network wants, or back."""
        return x.transpose(0, 1) if self._positions_first else x

    def _cast(self, x: Tensor) -> Tensor:
        """Return an activation in the precision of activations."""
        return x.bfloat16() if self._is_bf16 else x

    def _refine(self, x: Tensor, output: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Think n times with the question in sight, then answer once without it."""
        for _ in range(self.shape.l_cycles):
            latent = self._network(latent + (output + x))
        return self._network(output + latent), latent

    def _network(self, hidden: Tensor) -> Tensor:
        hidden = self._turned(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return self._turned(hidden)


def num_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _block(shape: Shape, generator: torch.Generator, *, positions_first: bool) -> nn.Module:
    positions = shape.prefix_len + shape.seq_len
    sizes: dict[str, Any] = {"expansion": shape.expansion, "multiple": shape.multiple}
    sizes["generator"] = generator
    if shape.net == "mlp":
        return MixerBlock(positions, shape.dim, positions_first=positions_first, **sizes)
    return AttentionBlock(positions, shape.dim, heads=shape.heads, **sizes)
