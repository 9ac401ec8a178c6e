"""One step of training against the published formulas, in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit import formulas
from trm_dist.model.layers import truncated_normal
from trm_dist.model.optim import Optimizer
from trm_dist.model.puzzles import PuzzleOptimizer
from trm_dist.model.supervision import Carry, Rows, Supervision
from trm_dist.model.trm import Shape, Trm

ROUNDS, THOUGHTS, HEADS, PREFIX = 2, 2, 2, 2
GLOBAL_BATCH = 8
LABELS = np.array([[1, 2, -100, 4, 0], [3, 3, 3, -100, -100], [6, 5, 4, 3, 2]])
TOKENS = np.array([[0, 1, 2, 3, 4], [6, 6, 0, 0, 1], [5, 4, 3, 2, 1]])
PUZZLES = np.array([3, 1, 3])


class Case:
    """A model with random weights everywhere, and its first supervision step."""

    def __init__(self, net: str) -> None:
        shape = Shape(
            net=net, dim=8, depth=2, heads=HEADS, seq_len=5, prefix_len=PREFIX, num_tokens=7,
            expansion=2.0, h_cycles=ROUNDS, l_cycles=THOUGHTS, puzzle_emb_ndim=11, num_puzzles=5,
        )  # type: ignore[arg-type] # fmt: skip
        self.model = Trm(shape, seed=4).double()
        generator = torch.Generator().manual_seed(0)
        for tensor in (self.model.puzzle_embedding, self.model.halt_head.weight):
            nn.init.normal_(tensor, generator=generator)
        nn.init.constant_(self.model.halt_head.bias, 0.3)
        self.weights = {k: v.detach().numpy().copy() for k, v in self.model.state_dict().items()}
        task = Supervision(self.model, n_sup=4, halt_explore=0.0, loss="stablemax", seed=0)
        rows = Rows(
            np.arange(3), torch.from_numpy(TOKENS), torch.from_numpy(LABELS),
            torch.full((3,), 1 / GLOBAL_BATCH, dtype=torch.float64), 1, torch.from_numpy(PUZZLES),
        )  # fmt: skip
        self.objective, _, self.carry = task.step(self.model, task.start(rows))

    def before_the_last_round(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """y and z that have no gradient."""
        size = (PREFIX + TOKENS.shape[1], 1)
        y, z = (np.tile(self.weights[f"{each}_init"], size) for each in ("output", "latent"))
        x = self.question(row, self.weights)
        for _ in range(ROUNDS - 1):
            y, z = formulas.latent_recursion(x, y, z, self.weights, THOUGHTS, HEADS)
        return y, z

    def question(self, row: int, weights: dict[str, np.ndarray]) -> np.ndarray:
        vector = weights["puzzle_embedding"][PUZZLES[row]]
        return formulas.question(TOKENS[row], vector, weights, PREFIX)

    def loss(self, row: int, y: np.ndarray, z: np.ndarray, weights: dict[str, np.ndarray]) -> float:
        """The row's part of the objective after the last round."""
        x = self.question(row, weights)
        y, z = formulas.latent_recursion(x, y, z, weights, THOUGHTS, HEADS)
        logits, halt = formulas.heads_of(y, weights, PREFIX)
        return formulas.objective(logits, halt, LABELS[row], GLOBAL_BATCH)

    def slope(self, name: str, place: tuple[int, ...], rows: list[int]) -> float:
        """The gradient of some rows' objective by one weight, by central differences."""
        found = 0.0
        for row in rows:
            carried = self.before_the_last_round(row)
            for sign in (1, -1):
                weights = self.weights | {name: self.weights[name].copy()}
                weights[name][place] += sign * 1e-5
                found += sign * self.loss(row, *carried, weights) / 2e-5
        return found


@pytest.fixture(params=["mlp", "attn"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_objective_of_a_step_is_that_of_the_formulas(case: Case) -> None:
    carried = [case.before_the_last_round(row) for row in range(3)]
    wanted = sum(case.loss(row, *carried[row], case.weights) for row in range(3))
    assert case.objective.item() == pytest.approx(wanted, rel=1e-11)


def test_carry_of_a_step_is_that_of_the_formulas(case: Case) -> None:
    for row in range(3):
        x = case.question(row, case.weights)
        y, z = formulas.latent_recursion(
            x, *case.before_the_last_round(row), case.weights, THOUGHTS, HEADS
        )
        np.testing.assert_allclose(case.carry.output[row].numpy(), y, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(case.carry.latent[row].numpy(), z, rtol=1e-10, atol=1e-12)


def test_gradient_runs_through_the_last_round_alone(case: Case) -> None:
    case.objective.backward()
    chance = np.random.default_rng(1)
    for name, parameter in case.model.named_parameters():
        place = tuple(int(chance.integers(size)) for size in parameter.shape)
        if name == "embedding":
            place = (3, place[1])  # a token of all rows
        if name.startswith("halt_head"):
            place = (0, *place[1:])
        assert parameter.grad is not None
        slope = case.slope(name, place, [0, 1, 2])
        assert parameter.grad[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-10), name


def test_vectors_of_puzzles_follow_the_sign_of_their_rows_gradients(case: Case) -> None:
    case.objective.backward()
    stepper = optimizer(case, warmup_steps=10)
    take(stepper, case.carry, is_active=[True, True, True])
    stepper.step(global_step=4)
    lr, vectors = 0.5 * 0.02, case.weights["puzzle_embedding"]
    wanted = vectors.copy()
    for puzzle, rows in ((3, [0, 2]), (1, [1])):
        slopes = [
            np.array([case.slope("puzzle_embedding", (puzzle, i), [row]) for i in range(11)])
            for row in rows
        ]
        wanted[puzzle] = formulas.sign_sgd(vectors[puzzle], slopes, lr, weight_decay=0.1)
    np.testing.assert_allclose(case.model.puzzle_embedding.numpy(), wanted, rtol=1e-12)


def test_puzzle_without_an_active_row_keeps_its_vector(case: Case) -> None:
    case.objective.backward()
    stepper = optimizer(case, warmup_steps=0)
    take(stepper, case.carry, is_active=[True, False, True])
    stepper.step(global_step=0)
    changed = (case.model.puzzle_embedding.numpy() != case.weights["puzzle_embedding"]).any(1)
    assert changed.tolist() == [False, False, False, True, False]


def optimizer(case: Case, warmup_steps: int) -> PuzzleOptimizer:
    return PuzzleOptimizer(
        case.model.puzzle_embedding, batch_size=3, lr=0.02, warmup_steps=warmup_steps,
        weight_decay=0.1,
    )  # fmt: skip


def take(stepper: PuzzleOptimizer, carry: Carry, is_active: list[bool]) -> None:
    assert carry.vectors is not None
    assert carry.vectors.grad is not None
    table = stepper.begin(torch.from_numpy(PUZZLES))
    stepper.take(0, carry.vectors.grad, torch.tensor(is_active))
    assert table.any()


def test_weights_follow_the_angle_of_their_moments() -> None:
    module = nn.Linear(3, 1, bias=False).double()
    before = module.weight.detach().flatten().tolist()
    stepper = Optimizer(
        module, lr=0.1, warmup_steps=0, weight_decay=1.0, clip=0, name="adam-atan2"
    )  # fmt: skip
    chance = np.random.default_rng(2)
    gradients = chance.normal(size=(9, 3)) * [1e-9, 1.0, 1e9]
    for count, each in enumerate(gradients):
        module.weight.grad = torch.from_numpy(each[None])
        stepper.step(count)
    wanted = [
        formulas.adam_atan2(weight, list(column), lr=0.1, weight_decay=1.0)
        for weight, column in zip(before, gradients.T, strict=True)
    ]
    assert module.weight.flatten().tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("std", [1.0, 512**-0.5])
def test_weights_start_as_a_cut_normal_of_the_wanted_deviation(std: float) -> None:
    count = 400_000
    drawn = truncated_normal((count,), std, torch.Generator().manual_seed(0)).double().numpy()
    assert abs(drawn.mean()) < 5 * std / math.sqrt(count)
    assert drawn.std() == pytest.approx(std, rel=0.005)
    for quantile in (-2.2, -1.5, -0.4, 0.1, 1.0, 2.0):
        share = formulas.truncated_normal_cdf(quantile * std, std)
        allowed = 5 * math.sqrt(share * (1 - share) / count)
        assert abs((drawn < quantile * std).mean() - share) < allowed
    assert abs(drawn).max() <= 2 * std / 0.8796
