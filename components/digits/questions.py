"""Questions about a grid of coloured digits: one function per kind, and a selection that balances answers.

Every answer names each place before its content, and ends with the conclusion. So each word needs at most one cell of the
image; a wrong word misleads those after it; and no kind depends on one circuit that a small model finds late and by luck
(docs/log.md).

A kind lists every sensible question about a scene with its answer, its cells (the region that attention should point to), and
its *strata*: labels from coarse to fine, the result of the answer first. `ask` takes the option whose strata were used least
so far in the split, which balances answers in one pass.
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

    place: str  # column letter and row number: "a1" is the top left cell
    value: int
    colour: str
    raw: int  # index of the raw digit


class Scene(NamedTuple):
    places: tuple[str, ...]  # names of all cells, in reading order
    digits: tuple[Digit, ...]  # in reading order

    def at(self, place: str) -> Digit | None:
        return next((digit for digit in self.digits if digit.place == place), None)

    def digit(self, place: str) -> str:
        """Digit of a cell as a word."""
        found = self.at(place)
        return EMPTY if found is None else DIGITS[found.value]

    def colour(self, place: str) -> str:
        found = self.at(place)
        return EMPTY if found is None else found.colour

    @property
    def lines(self) -> dict[str, tuple[str, ...]]:
        """Rows and columns by name, each with its places in reading order."""
        grid = round(len(self.places) ** 0.5)
        rows = {f"row {NUMBERS[row + 1]}": self.places[row * grid : (row + 1) * grid] for row in range(grid)}
        return rows | {f"column {self.places[column][0]}": self.places[column::grid] for column in range(grid)}


class Option(NamedTuple):
    question: str
    answer: str
    strata: tuple[str, ...]
    cells: tuple[str, ...]  # places asked about


class Asked(NamedTuple):
    kind: str
    question: str
    answer: str
    cells: tuple[str, ...]


def places(grid: int) -> tuple[str, ...]:
    """Names of the cells in reading order, as on a chess board seen from above: a1 b1 c1 ... a2 b2 ..."""
    return tuple(f"{'abcdefghi'[column]}{row + 1}" for row in range(grid) for column in range(grid))


# --- the kinds --------------------------------------------------------------------------------------------------------


def digit(scene: Scene) -> list[Option]:
    return [
        Option(f"What digit is at {d.place}?", f"{d.place} {DIGITS[d.value]}", (DIGITS[d.value], d.place), (d.place,))
        for d in scene.digits
    ]


def colours(scene: Scene) -> list[Option]:
    return [
        Option(f"Which colours are in {line}?", _coloured(scene, cells), (line,), cells) for line, cells in scene.lines.items()
    ]


def describe(scene: Scene) -> list[Option]:
    return [
        Option(f"Describe {line}.", f"{_read(scene, cells)} then {_coloured(scene, cells)}", (line,), cells)
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
    """Options about each ordered pair of digits, by place."""
    options = []
    for a, b in permutations(scene.digits, 2):
        word = NUMBERS[result(a.value, b.value)]
        read = {"a": f"{a.place} {DIGITS[a.value]}", "b": f"{b.place} {DIGITS[b.value]}", "result": word}
        options.append(Option(question.format(a=a.place, b=b.place), answer.format(**read), (word,), (a.place, b.place)))
    return options


def _lines(scene: Scene, question: str, result: Callable[[list[int]], int], least: int) -> list[Option]:
    """Options about each row and column with at least `least` digits."""
    options = []
    for line, cells in scene.lines.items():
        values = [digit.value for digit in scene.digits if digit.place in cells]
        if len(values) >= least:
            word = NUMBERS[result(values)]
            options.append(Option(question.format(line=line), f"{_read(scene, cells)} so {word}", (word, line), cells))
    return options


def _read(scene: Scene, cells: tuple[str, ...]) -> str:
    return " ".join(f"{cell} {scene.digit(cell)}" for cell in cells)


def _coloured(scene: Scene, cells: tuple[str, ...]) -> str:
    return " ".join(f"{cell} {scene.colour(cell)}" for cell in cells)


def _described(scene: Scene, cells: tuple[str, ...]) -> str:
    """Description in three words per cell."""
    return " ".join(f"{cell} {scene.colour(cell)} {scene.digit(cell) if scene.at(cell) else 'cell'}" for cell in cells)


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
    return [("Describe the rows.", _described(scene, scene.places)), ("Describe the columns.", _described(scene, by_column))]


# --- the choice -------------------------------------------------------------------------------------------------------


class Balance:
    """Usage counts of each kind and of its strata in one split."""

    def __init__(self) -> None:
        self._used: Counter[tuple[str, ...]] = Counter()

    def kinds(self, rng: np.random.Generator) -> list[str]:
        """All kinds, least used first, ties in random order."""
        return sorted(KINDS, key=lambda kind: (self._used[kind,], rng.random()))

    def rarest(self, kind: str, options: list[Option], rng: np.random.Generator) -> Option:
        """Option of the least used strata, compared from coarse to fine; ties at random."""
        for depth in range(1, max(len(option.strata) for option in options) + 1):
            uses = [self._used[kind, *option.strata[:depth]] for option in options]
            least = min(uses)
            options = [option for option, used in zip(options, uses, strict=True) if used == least]
        return options[rng.integers(len(options))]

    def record(self, kind: str, option: Option) -> None:
        path = (kind, *option.strata)
        self._used.update(path[:end] for end in range(1, len(path) + 1))


def ask(scene: Scene, amount: int, balance: Balance, rng: np.random.Generator) -> list[Asked]:
    """`amount` different questions, shuffled; a kind repeats only after a round over all kinds.

    Raises DataError if the scene has fewer questions.
    """
    asked: dict[str, Asked] = {}
    while len(asked) < amount:
        before = len(asked)
        for kind in balance.kinds(rng):
            options = [option for option in KINDS[kind](scene) if option.question not in asked]
            if options and len(asked) < amount:
                best = balance.rarest(kind, options, rng)
                balance.record(kind, best)
                asked[best.question] = Asked(kind, best.question, best.answer, best.cells)
        if len(asked) == before:
            raise DataError(
                f"params/data.yaml: digits.instructions_per_image: {amount} are too many, an image of"
                f" {len(scene.digits)} digits has {before} different ones; lower it or raise digits.filled"
            )
    mixed = list(asked.values())
    rng.shuffle(mixed)  # type: ignore[arg-type]
    return mixed
