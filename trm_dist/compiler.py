"""torch's compiler, which nothing here uses, stays out until somebody asks for it.

Importing it takes as long as importing torch itself. Optimizers and DDP do so at their first use,
only to ask it to leave them alone. So a stand-in answers them; whoever asks it for anything else
gets the real one, which is imported then and stays.

Sources: torch/_compile.py, torch/optim/optimizer.py, torch/nn/parallel/distributed.py.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_NAME = "torch._dynamo"


class _StandIn(ModuleType):
    """A module with the few answers that hold as long as nothing is compiled."""

    def __init__(self, name: str, answers: dict[str, Any]) -> None:
        super().__init__(name)
        vars(self).update(answers)

    def __getattr__(self, name: str) -> Any:
        # Whoever goes through all modules, as `inspect` does, asks for `__file__` and means none of
        # this; whoever imports a part of the real one asks for `__path__`.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(_load(self.__name__), name)


def defer_compiler() -> None:
    """Let optimizers and DDP do without the compiler, unless it is there already."""
    if _NAME in sys.modules:
        return
    utils = _StandIn(f"{_NAME}.utils", {"get_optimize_ddp_mode": lambda: "ddp_optimizer"})
    answers = {"disable": _as_it_is, "graph_break": lambda: None, "utils": utils}
    sys.modules[_NAME] = vars(torch)["_dynamo"] = _StandIn(_NAME, answers)


def _as_it_is(
    function: Callable[..., Any] | None = None, *_: Any, **_options: Any
) -> Callable[..., Any]:
    """Return the function, which nobody compiles; without one, what returns it."""
    return function or _as_it_is


def _load(name: str) -> ModuleType:
    """Import the real compiler in the place of the stand-in, and return a module of it."""
    if isinstance(sys.modules.get(_NAME), _StandIn):
        del sys.modules[_NAME]
        vars(torch).pop("_dynamo")
    return importlib.import_module(name)
