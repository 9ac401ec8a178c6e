"""What a trained model answers: puzzles beside the truth, or completions of text."""

import json
import math
import os
import sys
from dataclasses import dataclass
from typing import Any
from unicodedata import category

import numpy as np
import numpy.typing as npt
import torch
import tyro

from trm_dist.config import DataConfig
from trm_dist.data import codec, sudoku
from trm_dist.data.dataset import IGNORED, Dataset, open_dataset
from trm_dist.errors import UserError
from trm_dist.export import Model, Weights, load_model
from trm_dist.logs import say
from trm_dist.plan import cache_of, check_puzzles

_GREEN, _RED, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class PredictArguments:
    """Show what a model answers, from a checkpoint or an exported file."""

    path: tyro.conf.Positional[str] = "checkpoints"
    """Checkpoint, exported model, or a directory, of which the newest checkpoint is taken."""
    dataset: str = ""
    """Questions; empty: the evaluation set of the run, or else what it was trained on."""
    first: int = 0
    """Number of the first sample shown."""
    count: int = 4
    """How many are shown."""
    ask: str = ""
    """A question of your own: text, or a puzzle as its cells row by row, blanks as dots."""
    weights: Weights = "ema"
    """Averaged weights, or those of the last step."""
    json: bool = False
    """Print one JSON document and nothing else."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One question and what became of it; tokens, [L]."""

    number: int
    """Of the sample; -1: a question of one's own."""
    question: npt.NDArray[np.int64]
    answer: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64] | None
    """-100 where a position does not count."""
    steps: int
    """Supervision steps after which the halting head would have stopped."""

    @property
    def is_right(self) -> npt.NDArray[np.bool_] | None:
        """Whether each position that counts is right, and True elsewhere."""
        if self.truth is None:
            return None
        return np.asarray((self.answer == self.truth) | (self.truth == IGNORED))


def predict(arguments: PredictArguments) -> int:
    """Print answers."""
    if arguments.first < 0 or arguments.count < 1:
        raise UserError("predict: --first must not be negative, and --count at least 1.")
    model = load_model(arguments.path, arguments.weights)
    if arguments.ask:
        inputs, labels, numbers = _encode(arguments.ask, model), None, np.array([-1])
        puzzles = None
    else:
        dataset = _open(arguments.dataset, model)
        last = min(arguments.first + arguments.count, dataset.num_samples)
        numbers = np.arange(arguments.first, last)
        if not len(numbers):
            raise UserError(
                f"predict: --first {arguments.first}, and {dataset.url} has "
                f"{dataset.num_samples} samples, counted from 0."
            )
        inputs, labels = dataset.rows(numbers)
        puzzles = dataset.puzzles_of(numbers)
    answers = answer(model, inputs, labels, numbers, puzzles)
    if arguments.json:
        say(json.dumps([_as_plain(each, model.codec) for each in answers]))
        return 0
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    draw = {"bytes": _draw_text, "grid": _draw_grid}.get(model.codec, _draw_puzzle)
    say(f"{model.name}, {arguments.weights} weights, {model.task.max_steps} supervision steps")
    for each in answers:
        say("\n" + _title(each))
        say(draw(each, colours))
    return 0


def answer(
    model: Model, inputs: npt.NDArray[np.int64], labels: npt.NDArray[np.int64] | None,
    numbers: npt.NDArray[np.int64], puzzles: npt.NDArray[np.int64] | None = None,
) -> list[Answer]:  # fmt: skip
    """Answer questions, int64 [N, L], which belong to puzzles, int64 [N]."""
    found: list[Answer] = []
    for start in range(0, len(inputs), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        of_some = None if puzzles is None else torch.from_numpy(puzzles[some])
        tokens, steps = model.task.answer(torch.from_numpy(inputs[some]), of_some)
        for row, number in enumerate(numbers[some]):
            truth = None if labels is None else labels[start + row]
            found.append(
                Answer(
                    int(number), inputs[start + row], tokens[row].numpy(), truth, int(steps[row])
                )
            )
    return found


def _open(url: str, model: Model) -> Dataset:
    data = model.config.data
    dataset = open_dataset(
        url or data.eval_dataset or data.dataset,
        seq_len=model.config.model.seq_len,
        overlong=data.overlong,
        cache=cache_of(DataConfig()),
    )
    if dataset.codec != model.codec:
        raise UserError(
            f"--dataset {dataset.url} ({dataset.codec}) is not of the kind that {model.name} was "
            f"trained on ({model.codec})."
        )
    check_puzzles(model.config, dataset, model.task.module.shape.num_puzzles)
    return dataset


def _encode(question: str, model: Model) -> npt.NDArray[np.int64]:
    length = model.config.model.seq_len
    if model.codec == "bytes":
        return codec.encode([("", question, "")], length).inputs.astype(np.int64)
    if not model.codec.startswith("sudoku"):
        raise UserError(f"--ask: questions can be asked of puzzles and text, not of {model.codec}.")
    side = math.isqrt(length)
    cells = "".join(question.split())
    if len(cells) != length or not all(
        cell in ".0" or (cell.isascii() and cell.isdigit() and int(cell) <= side) for cell in cells
    ):
        raise UserError(
            f"--ask: a puzzle is {length} cells, row by row, each a digit from 1 to {side} or a "
            f"dot; this has {len(cells)} cells."
        )
    digits = [0 if cell == "." else int(cell) for cell in cells]
    return np.array([digits], dtype=np.int64) + sudoku.BLANK


# -- what is shown ---------------------------------------------------------------------------------


def _title(found: Answer) -> str:
    what = f"sample {found.number}" if found.number >= 0 else "your question"
    steps = f"would halt after {found.steps} step(s)"
    right = found.is_right
    if right is None:
        return f"{what}: {steps}"
    counts = np.asarray(found.truth) != IGNORED
    score = f"{int((right & counts).sum())} of {int(counts.sum())} right"
    return f"{what}: {'exact' if right.all() else 'not exact'}, {score}, {steps}"


def _draw_puzzle(found: Answer, colours: bool) -> str:
    """Question, answer and truth side by side; a wrong cell has a mark where there is no colour."""
    return _side_by_side(found, found.question == sudoku.BLANK, colours)


def _draw_grid(found: Answer, colours: bool) -> str:
    """The same for grids, of which any cell may be asked for."""
    is_asked = np.ones(len(found.question), bool)
    if found.truth is not None:
        is_asked = found.truth != IGNORED
    return _side_by_side(found, is_asked, colours)


def _side_by_side(found: Answer, is_asked: npt.NDArray[np.bool_], colours: bool) -> str:
    length = len(found.question)
    side = math.isqrt(length)
    width = side if side * side == length else length
    grids = [[_cell(token) for token in found.question], _marked_cells(found, is_asked, colours)]
    if found.truth is not None:
        grids.append([_cell(token) for token in found.truth])
    lines = [
        "   |  ".join(" ".join(grid[start : start + width]) for grid in grids)
        for start in range(0, length, width)
    ]
    return "\n".join(lines)


def _marked_cells(found: Answer, is_asked: npt.NDArray[np.bool_], colours: bool) -> list[str]:
    right = found.is_right
    cells = []
    for at, token in enumerate(found.answer):
        cell = _cell(token)
        if is_asked[at] and right is not None:
            if colours:
                cell = f"{_GREEN if right[at] else _RED}{cell}{_PLAIN}"
            elif not right[at]:
                cell = f"!{cell.strip()}"
        cells.append(cell)
    return cells


def _cell(token: int) -> str:
    digit = int(token) - sudoku.BLANK
    return f"{digit if digit > 0 else '.':>2}"


def _draw_text(found: Answer, colours: bool) -> str:
    said = _shown(found.answer)
    right = found.is_right
    if colours and right is not None:
        said = f"{_GREEN if right.all() else _RED}{said}{_PLAIN}"
    lines = [f"question: {_shown(found.question)}", f"answer:   {said}"]
    if found.truth is not None:
        lines.append(f"truth:    {_shown(_counting(found.truth))}")
    return "\n".join(lines)


def _shown(tokens: npt.NDArray[np.int64]) -> str:
    """Return text as a terminal may show it: what would command the terminal is spelled out."""
    text = codec.decode(tokens)
    return "".join(
        repr(each)[1:-1] if category(each) == "Cc" and each not in "\n\t" else each for each in text
    )


def _counting(truth: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.where(truth == IGNORED, codec.PAD, truth)


def _as_plain(found: Answer, kind: str) -> dict[str, Any]:
    right = found.is_right
    shown: dict[str, Any] = {"number": found.number, "steps": found.steps}
    shown["exact"] = None if right is None else bool(right.all())
    if kind == "bytes":
        truth = None if found.truth is None else codec.decode(_counting(found.truth))
        return shown | {
            "question": codec.decode(found.question), "answer": codec.decode(found.answer),
            "truth": truth,
        }  # fmt: skip
    names = {"question": found.question, "answer": found.answer, "truth": found.truth}
    return shown | {
        name: None if tokens is None else (tokens - sudoku.BLANK).tolist()
        for name, tokens in names.items()
    }
