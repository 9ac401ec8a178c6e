"""Each in a process of its own: who has imported the compiler keeps it."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

BEFORE = """
    import inspect, sys
    import torch
    from trm_dist.compiler import defer_compiler
    from trm_dist.train import pin_numerics

    def is_there():
        return "torch._dynamo.eval_frame" in sys.modules

    pin_numerics(1)
    defer_compiler()
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([weight], fused=True)
"""


def run(script: str) -> None:
    script = textwrap.dedent(BEFORE) + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_numerics_are_pinned_and_optimizers_step_without_the_compiler() -> None:
    run("""
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        weight.sum().backward()
        adam.step()
        adam.zero_grad()
        assert adam.state_dict()["state"][0]["step"] == 1
        assert float(weight[0]) < 1
        assert torch._dynamo.disable(recursive=False)(print) is print
        inspect.getmodule(compile("1", "nowhere", "eval"))  # it asks all modules for their files
        assert not is_there()
    """)


def test_who_asks_for_more_gets_the_real_compiler() -> None:
    run("""
        assert torch._dynamo.config.optimize_ddp is True
        assert is_there()
        assert sys.modules["torch._dynamo"] is torch._dynamo
        assert torch._dynamo.__file__
        adam.zero_grad()
    """)


def test_who_imports_a_part_of_the_compiler_gets_the_real_one() -> None:
    run("""
        import torch._dynamo.config as config
        from torch._dynamo import eval_frame
        assert eval_frame.config is config is sys.modules["torch._dynamo.config"]
        assert config.__spec__.origin == config.__file__
        assert torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer"
    """)


def test_what_is_compiled_runs() -> None:
    run("""
        from torch._dynamo.testing import CompileCounter
        counter = CompileCounter()
        double = torch.compile(lambda values: values * 2, backend=counter)
        assert double(torch.ones(2)).tolist() == [2, 2]
        assert counter.frame_count == 1
    """)


def test_compiler_that_is_there_stays() -> None:
    run("""
        real = torch._dynamo.eval_frame and torch._dynamo
        defer_compiler()
        assert torch._dynamo is sys.modules["torch._dynamo"] is real
    """)


def test_a_network_is_compiled_by_the_real_one() -> None:
    run("""
        from tests.unit.test_kernels import make, results
        assert not is_there()
        results(make("mlp", is_compiled=True))
        assert is_there()
        adam.zero_grad()
    """)
