"""torch's compiler, which nothing here uses, stays out until somebody asks for it.

Importing it takes as long as importing torch itself. Optimizers and DDP do so at their first use,
only to ask it to leave them alone. So a stand-in answers them; whoever asks it for anything else,
or imports a part of it, gets the real one, which is imported then and stays.

Sources: torch/_compile.py, torch/optim/optimizer.py, torch/nn/parallel/distributed.py.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_NAME = "torch._dynamo"


class _StandIn(ModuleType):
    """A module with the few answers that hold as long as nothing is compiled."""

    def __init__(self, name: str, answers: dict[str, Any]) -> None:
        super().__init__(name)
        vars(self).update(answers, __path__=[])

    def __getattr__(self, name: str) -> Any:
        # `inspect` asks all modules for `__file__` and the like, and means none of this.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_load(self.__name__), name)


class _Parts(MetaPathFinder, Loader):
    """Finds the parts of the real compiler while the stand-in is there."""

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_asked = name.startswith(f"{_NAME}.") and isinstance(sys.modules.get(_NAME), _StandIn)
        return ModuleSpec(name, self) if is_asked else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _load(spec.name)
        self._spec = module.__spec__  # the one of here takes its place meanwhile
        return module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__spec__"] = self._spec


def defer_compiler() -> None:
    """Let optimizers and DDP do without the compiler, unless it is there already."""
    if _NAME in sys.modules:
        return
    utils = _StandIn(f"{_NAME}.utils", {"get_optimize_ddp_mode": lambda: "ddp_optimizer"})
    answers = {"disable": _as_it_is, "graph_break": lambda: None, "utils": utils}
    sys.modules[_NAME] = vars(torch)["_dynamo"] = _StandIn(_NAME, answers)
    sys.meta_path.insert(0, _Parts())


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
