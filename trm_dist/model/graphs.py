"""TRM's forward and backward on a GPU, each as one launch.

A step calls the same small network dozens of times, about a thousand kernels of a few microseconds
each, and starting them one by one takes longer than they do. Shards have always the same number of
rows, so the kernels are recorded once (a CUDA graph) and replayed: the same kernels on the same
numbers, hence the same bits.

Evaluation has the module in eval mode, where it runs as before.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from trm_dist.model.trm import Trm


def record(module: Trm, num_rows: int) -> None:
    """Record a module's forward and backward, which from now on replays them while it trains.

    The gradients of each backward lie in memory that the next one writes again. Parameters must
    stay where they are.

    Args:
        module: On a GPU; its `forward` is replaced.
        num_rows: Of every batch that it will be trained with.
    """
    device = module.output_init.device
    tokens = torch.zeros(num_rows, module.shape.seq_len, dtype=torch.int64, device=device)
    vectors = module.vectors_of(None, num_rows)
    with torch.no_grad():  # what steps hand on, in its order of memory
        carried = module(tokens, *module.start(num_rows), vectors)[2:]
    sample = [tokens, *carried]
    if vectors is not None:
        sample.append(vectors)
    with warnings.catch_warnings():
        # Autograd's own thread warns at its first product, and the compiler of TF32, which nobody
        # wants here, and of what it looks at itself.
        warnings.simplefilter("ignore")
        torch.cuda.make_graphed_callables(module, tuple(sample))
    # It is recorded on a stream of its own, which autograd then waits for, as it should; newer
    # versions of torch tell so.
    quieten = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if quieten:
        quieten(False)
    replay: Any = module.forward

    def forward(
        tokens: Tensor, output: Tensor, latent: Tensor, vectors: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        more = () if vectors is None else (vectors,)
        logits, halt, output, latent = replay(tokens, output, latent, *more)
        # The next replay writes to the same memory, and these outlive it.
        return logits, halt, output.detach().clone(), latent.detach().clone()

    module.forward = forward  # type: ignore[method-assign]
