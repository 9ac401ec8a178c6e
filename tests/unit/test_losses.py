import math

import pytest
import torch

from trm_dist.model.losses import score_rows, stablemax_strength


def test_stablemax_strengths_by_hand() -> None:
    logits = torch.tensor([-3.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    assert stablemax_strength(logits).tolist() == [0.25, 0.5, 1.0, 3.0]


def scores(labels: list[list[int]], loss: str = "stablemax") -> tuple[list[float], ...]:
    logits = torch.tensor([[[0.0, 3.0], [1.0, -1.0]]] * len(labels), dtype=torch.float64)
    halt = torch.zeros(len(labels), dtype=torch.float64)
    found = score_rows(logits, halt, torch.tensor(labels), loss)  # type: ignore[arg-type]
    return tuple(each.tolist() for each in found)


HALTING = 0.5 * math.log(2)


def test_stablemax_loss_by_hand() -> None:
    # Strengths (1, 4) and (2, 0.5): the labels have shares 4/5 and 2/2.5.
    (loss,), correct, cells = scores([[1, 0]])
    assert loss == pytest.approx(-math.log(0.8) + HALTING, rel=1e-12)
    assert (correct, cells) == ([2], [2])


def test_softmax_loss_by_hand() -> None:
    (loss,), *_ = scores([[1, 0]], "softmax")
    wanted = (math.log(1 + math.exp(-3)) + math.log(1 + math.exp(-2))) / 2
    assert loss == pytest.approx(wanted + HALTING, rel=1e-12)


def test_ignored_labels_count_nowhere() -> None:
    (loss,), correct, cells = scores([[1, -100]])
    assert loss == pytest.approx(-math.log(0.8) + HALTING, rel=1e-12)
    assert (correct, cells) == ([1], [1])


def test_row_without_labels_is_finite() -> None:
    (loss,), correct, cells = scores([[-100, -100]])
    assert loss == pytest.approx(HALTING)
    assert (correct, cells) == ([0], [0])


@pytest.mark.parametrize(("label", "target"), [(0, 1.0), (1, 0.0)])
def test_halting_learns_whether_the_row_is_solved(label: int, target: float) -> None:
    logits = torch.tensor([[[9.0, 0.0]]])
    halt = torch.zeros(1, requires_grad=True)
    score_rows(logits, halt, torch.tensor([[label]]), "stablemax").loss.sum().backward()
    assert halt.grad is not None
    assert halt.grad.item() == pytest.approx(0.5 * (0.5 - target))
