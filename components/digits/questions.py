"""Questions about a grid of coloured digits: one function per kind, and a selection that balances answers.

Every answer names each cell before its content, and ends with the conclusion. So each word needs at most one cell of the
image; a wrong word misleads those after it; and no kind depends on one circuit that a small model finds late and by luck
(docs/log.md).

A kind lists every sensible question about a scene with its answer, its cells (the region that attention should point to), and
its *strata*: labels from coarse to fine, the result of the answer first. `choose_questions` takes the option whose
strata were used least so far in the split, which balances answers in one pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import permutations
from typing import NamedTuple

import numpy as np

from components.errors import DataError

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)
DIGITS = NUMBERS[:10]
EMPTY = "empty"
CAPTIONS = 2  # per image of the train split


class Digit(NamedTuple):
    """Digit of a composed image."""

    cell: str  # column letter and row number: "a1" is the top left cell
    value: int
    colour: str
    raw: int  # index of the raw digit


class Scene(NamedTuple):
    cells: tuple[str, ...]  # names of all cells, in reading order
    digits: tuple[Digit, ...]  # in reading order

    def digit_at(self, cell: str) -> Digit | None:
        return next((digit for digit in self.digits if digit.cell == cell), None)

    def digit_word(self, cell: str) -> str:
        """Digit of a cell as a word."""
        digit = self.digit_at(cell)
        return EMPTY if digit is None else DIGITS[digit.value]

    def colour_word(self, cell: str) -> str:
        digit = self.digit_at(cell)
        return EMPTY if digit is None else digit.colour

    @property
    def lines(self) -> dict[str, tuple[str, ...]]:
        """Rows and columns by name, each with its cells in reading order."""
        grid = round(len(self.cells) ** 0.5)
        rows = {f"row {NUMBERS[row + 1]}": self.cells[row * grid : (row + 1) * grid] for row in range(grid)}
        return rows | {f"column {self.cells[column][0]}": self.cells[column::grid] for column in range(grid)}


class Option(NamedTuple):
    question: str
    answer: str
    strata: tuple[str, ...]
    cells: tuple[str, ...]  # cells that the question is about


class Question(NamedTuple):
    kind: str
    question: str
    answer: str
    cells: tuple[str, ...]


def cell_names(grid: int) -> tuple[str, ...]:
    """Names of the cells in reading order, as on a chess board seen from above: a1 b1 c1 ... a2 b2 ..."""
    return tuple(f"{'abcdefghi'[column]}{row + 1}" for row in range(grid) for column in range(grid))


# --- the kinds --------------------------------------------------------------------------------------------------------


def digit(scene: Scene) -> list[Option]:
    return [
        Option(f"What digit is at {d.cell}?", f"{d.cell} {DIGITS[d.value]}", (DIGITS[d.value], d.cell), (d.cell,))
        for d in scene.digits
    ]


def colours(scene: Scene) -> list[Option]:
    return [
        Option(f"Which colours are in {line}?", _colour_words(scene, cells), (line,), cells)
        for line, cells in scene.lines.items()
    ]


def describe(scene: Scene) -> list[Option]:
    return [
        Option(f"Describe {line}.", f"{_digit_words(scene, cells)} then {_colour_words(scene, cells)}", (line,), cells)
        for line, cells in scene.lines.items()
    ]


def larger(scene: Scene) -> list[Option]:
    return _pairs(scene, "Which is larger, {a} or {b}?", "{a} and {b} so {result}", max)


def add(scene: Scene) -> list[Option]:
    return _pairs(scene, "What is {a} plus {b}?", "{a} plus {b} is {result}", lambda a, b: a + b)


def difference(scene: Scene) -> list[Option]:
    return _pairs(scene, "How far apart are {a} and {b}?", "{a} and {b} so {result}", lambda a, b: abs(a - b))


def count(scene: Scene) -> list[Option]:
    return _lines(scene, "How many digits are in {line}?", len, least=0)


def extreme(scene: Scene) -> list[Option]:
    ends = (("largest", max), ("smallest", min))
    return [option for end, pick in ends for option in _lines(scene, f"What is the {end} digit in {{line}}?", pick, least=2)]


def _pairs(scene: Scene, question: str, answer: str, result: Callable[[int, int], int]) -> list[Option]:
    """Options about each ordered pair of digits, by cell."""
    options = []
    for a, b in permutations(scene.digits, 2):
        word = NUMBERS[result(a.value, b.value)]
        values = {"a": f"{a.cell} {DIGITS[a.value]}", "b": f"{b.cell} {DIGITS[b.value]}", "result": word}
        options.append(Option(question.format(a=a.cell, b=b.cell), answer.format(**values), (word,), (a.cell, b.cell)))
    return options


def _lines(scene: Scene, question: str, result: Callable[[list[int]], int], least: int) -> list[Option]:
    """Options about each row and column with at least `least` digits."""
    options = []
    for line, cells in scene.lines.items():
        values = [digit.value for digit in scene.digits if digit.cell in cells]
        if len(values) >= least:
            word = NUMBERS[result(values)]
            options.append(Option(question.format(line=line), f"{_digit_words(scene, cells)} so {word}", (word, line), cells))
    return options


def _digit_words(scene: Scene, cells: tuple[str, ...]) -> str:
    return " ".join(f"{cell} {scene.digit_word(cell)}" for cell in cells)


def _colour_words(scene: Scene, cells: tuple[str, ...]) -> str:
    return " ".join(f"{cell} {scene.colour_word(cell)}" for cell in cells)


def _cell_words(scene: Scene, cells: tuple[str, ...]) -> str:
    """Description in three words per cell."""
    return " ".join(
        f"{cell} {scene.colour_word(cell)} {scene.digit_word(cell) if scene.digit_at(cell) else 'cell'}" for cell in cells
    )


KINDS: dict[str, Callable[[Scene], list[Option]]] = {
    "digit": digit,
    "colours": colours,
    "describe": describe,
    "larger": larger,
    "sum": add,
    "difference": difference,
    "count": count,
    "extreme": extreme,
}


def captions(scene: Scene) -> list[tuple[str, str]]:
    """Captions, which models learn first: CAPTIONS questions whose answers describe every cell in three words.

    The first is in reading order, words 3i to 3i + 2 for cell i, which is easy to align. The second goes by columns, so that
    a cell is identified by its name, not by its position in the text.
    """
    by_column = tuple(cell for line, cells in scene.lines.items() if line.startswith("column") for cell in cells)
    return [("Describe the rows.", _cell_words(scene, scene.cells)), ("Describe the columns.", _cell_words(scene, by_column))]


# --- the choice -------------------------------------------------------------------------------------------------------


class Balance:
    """Usage counts of each kind and of its strata in one split."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, ...]] = Counter()

    def kinds(self, rng: np.random.Generator) -> list[str]:
        """All kinds, least used first, ties in random order."""
        return sorted(KINDS, key=lambda kind: (self._counts[kind,], rng.random()))

    def rarest(self, kind: str, options: list[Option], rng: np.random.Generator) -> Option:
        """Option of the least used strata, compared from coarse to fine; ties at random."""
        for depth in range(1, max(len(option.strata) for option in options) + 1):
            counts = [self._counts[kind, *option.strata[:depth]] for option in options]
            least = min(counts)
            options = [option for option, count in zip(options, counts, strict=True) if count == least]
        return options[rng.integers(len(options))]

    def record(self, kind: str, option: Option) -> None:
        path = (kind, *option.strata)
        self._counts.update(path[:end] for end in range(1, len(path) + 1))


def choose_questions(scene: Scene, amount: int, balance: Balance, rng: np.random.Generator) -> list[Question]:
    """`amount` different questions, shuffled; a kind repeats only after a round over all kinds.

    Raises DataError if the scene has fewer questions.
    """
    chosen: dict[str, Question] = {}
    while len(chosen) < amount:
        previous_count = len(chosen)
        for kind in balance.kinds(rng):
            options = [option for option in KINDS[kind](scene) if option.question not in chosen]
            if options and len(chosen) < amount:
                best = balance.rarest(kind, options, rng)
                balance.record(kind, best)
                chosen[best.question] = Question(kind, best.question, best.answer, best.cells)
        if len(chosen) == previous_count:
            raise DataError(
                f"params/data.yaml: digits.instructions_per_image: {amount} are too many, an image of"
                f" {len(scene.digits)} digits has {previous_count} different ones; lower it or raise digits.filled"
            )
    questions = list(chosen.values())
    rng.shuffle(questions)  # type: ignore[arg-type]
    return questions
