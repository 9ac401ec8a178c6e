import numpy as np
import pytest
import torch

from trm_dist.model.supervision import SCORES, Carry, Rows, Supervision
from trm_dist.model.trm import Shape, Trm

SHAPE = Shape(
    net="mlp", dim=8, depth=1, heads=1, seq_len=4, prefix_len=0, num_tokens=6, expansion=2.0,
    h_cycles=2, l_cycles=1,
)  # fmt: skip


class Scripted:
    """Stands in for the module: answers right, and halts where the script says."""

    def __init__(self, halts: list[list[bool]], labels: torch.Tensor) -> None:
        self.halts, self.labels, self.step = halts, labels, 0
        self.scale = torch.ones(1, requires_grad=True)

    def __call__(
        self, tokens: torch.Tensor, y: torch.Tensor, z: torch.Tensor, vectors: None
    ) -> tuple:
        logits = torch.nn.functional.one_hot(self.labels, 6).float() * self.scale
        halt = torch.where(torch.tensor(self.halts[self.step]), 1.0, -1.0) * self.scale
        self.step += 1
        return logits, halt, y, z


def make(n_sup: int = 3, explore: float = 0.0) -> Supervision:
    return Supervision(
        Trm(SHAPE, seed=0), n_sup=n_sup, halt_explore=explore, loss="stablemax", seed=0
    )


def rows(num_rows: int = 3, num_real: int = 3) -> Rows:
    tokens = torch.arange(4 * num_rows).reshape(num_rows, 4) % 4 + 2
    weights = (torch.arange(num_rows) < num_real).float() / num_real
    return Rows(np.arange(num_rows), tokens, tokens, weights, epoch=1)


def play(task: Supervision, given: Rows, halts: list[list[bool]]) -> list[dict[str, float]]:
    forward, carry, tables = Scripted(halts, given.labels), task.start(given), []
    for _ in halts:
        _, scores, carry = task.step(forward, carry)
        tables.append(dict(zip(SCORES, scores.tolist(), strict=True)))
    return tables


def test_every_row_counts_once_at_the_step_at_which_it_finishes() -> None:
    halts = [[True, False, False], [False, False, False], [False, True, False]]
    tables = play(make(), rows(), halts)
    assert [table["rows"] for table in tables] == [1, 0, 2]
    assert [table["active"] for table in tables] == [2, 2, 0]
    assert sum(table["steps"] for table in tables) == 1 + 3 + 3
    assert sum(table["exact"] for table in tables) == 3
    assert sum(table["cells"] for table in tables) == 12


def test_finished_rows_weigh_nothing_but_stay() -> None:
    halts = [[True, True, True], [False, False, False]]
    first, second = play(make(), rows(), halts)
    assert first["objective"] > 0
    assert second["objective"] == 0


def test_rows_that_fill_up_change_no_gradient_and_no_score() -> None:
    def gradient(num_rows: int) -> torch.Tensor:
        task = make(explore=0.5)
        objective, scores, _ = task.step(task.module, task.start(rows(num_rows, num_real=3)))
        objective.backward()
        assert scores[SCORES.index("active")] == 3
        grad = task.module.embedding.grad
        assert grad is not None
        return grad

    torch.testing.assert_close(gradient(3), gradient(7))


def carry_of(task: Supervision, samples: list[int], epoch: int) -> Carry:
    tokens = torch.full((len(samples), 4), 2)
    weights = torch.ones(len(samples))
    return task.start(Rows(np.array(samples), tokens, tokens, weights, epoch))


def test_exploration_belongs_to_the_sample_and_not_to_its_place() -> None:
    task = make(n_sup=16, explore=0.4)
    forward = carry_of(task, list(range(200)), 2).min_steps
    backward = carry_of(task, list(range(199, -1, -1)), 2).min_steps
    assert torch.equal(forward, backward.flip(0))
    assert not torch.equal(forward, carry_of(task, list(range(200)), 3).min_steps)
    assert 0.25 < (forward > 1).float().mean() < 0.55
    assert set(forward.tolist()) <= {*range(1, 17)}


def test_exploring_rows_do_not_halt_early() -> None:
    task = make(n_sup=3, explore=0.99)
    given = rows()
    least = task.start(given).min_steps
    tables = play(task, given, [[True] * 3] * 3)
    ended = [int(table["rows"]) for table in tables]
    assert ended == [int((least == step).sum()) for step in (1, 2, 3)]
    assert ended[0] < 3


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_evaluation_counts_real_rows_only(num_rows: int) -> None:
    given = rows()
    correct, cells, exact, counted, steps = (
        make().evaluate(given.tokens, given.labels, num_rows).tolist()
    )
    assert (cells, counted) == (4 * num_rows, num_rows)
    assert 0 <= exact <= counted
    assert 0 <= correct <= cells
    assert steps == 3 * num_rows, "nothing halts before it has learned when"
