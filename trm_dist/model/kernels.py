"""The network's kernels, written by torch's compiler.

Between two matrix products lie sums, norms and gates, each of which goes through memory once more
where it is a kernel of its own. The compiler makes one kernel of them. Shapes are fixed, no kernel
is chosen by timing it, and what was compiled is kept on disk (TORCHINDUCTOR_CACHE_DIR), so that
every start has the same kernels, and all but the first have them soon. They round otherwise than
those of `layers`: a run is trained with one kind.

Evaluation has the module in eval mode, where it runs as before.
"""

import importlib

import torch
from torch import Tensor

from trm_dist.model.trm import Trm


def load_compiler() -> None:
    """Import torch's compiler, which takes as long as torch itself; nothing of it stays running."""
    from torch._dynamo import config as tracing
    from torch._inductor import config

    tracing.optimize_ddp = False  # it would cut the network at the buckets of DDP
    # A pool of processes would outlive a killed worker, and whoever has one cannot be forked.
    config.compile_threads = 1
    config.deterministic = True
    # It asks for a GPU while it is imported, and who has asked cannot be forked either.
    config.use_experimental_benchmarker = False
    importlib.import_module("torch._inductor.compile_fx")
    if torch.version.cuda is None:
        # What this processor can do is tried out in processes, for two seconds; who is forked after
        # that knows it.
        importlib.import_module("torch._inductor.cpu_vec_isa").pick_vec_isa()


def compile_network(module: Trm, backend: str = "inductor") -> None:
    """Let a module train with compiled kernels, which are made when it is first called.

    Args:
        module: Its network is replaced.
        backend: Of torch.compile; "aot_eager" makes no kernels and needs no C compiler.
    """
    load_compiler()
    eager = module._network
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=backend)

    def network(hidden: Tensor) -> Tensor:
        return compiled(hidden) if module.training else eager(hidden)

    module._network = network  # type: ignore[method-assign]
