"""What can be asked about a grid of coloured digits: one small function per kind, and the choice that keeps answers even.

A kind lists every sensible question about a scene with its answer and its *strata*: labels from coarse to fine, the
answer first. `ask` takes the option whose strata were used least so far in the split, so answers come out even, and
yes and no exactly so, without a second pass. An option also names the cells that the question asks about, so that it is
known where a model should look; a question about the whole image (how many digits, which, the largest) names none.
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
CAPTIONS = 4  # per image of the train split


class Digit(NamedTuple):
    """One digit of a composed image."""

    place: str  # column letter, row number: "a1" is the top left cell
    value: int
    colour: str
    raw: int  # which raw digit was drawn


class Scene(NamedTuple):
    places: tuple[str, ...]  # of all cells, in reading order
    colours: tuple[str, ...]  # the whole palette
    digits: tuple[Digit, ...]  # in reading order


class Option(NamedTuple):
    question: str
    answer: str
    strata: tuple[str, ...]
    cells: tuple[str, ...] = ()  # places asked about


class Asked(NamedTuple):
    kind: str
    question: str
    answer: str
    cells: tuple[str, ...]


def places(grid: int) -> tuple[str, ...]:
    """Names of the cells in reading order, as on a chess board seen from above: a1 b1 c1 ... a2 b2 ..."""
    return tuple(f"{'abcdefghi'[column]}{row + 1}" for row in range(grid) for column in range(grid))


# --- the kinds --------------------------------------------------------------------------------------------------------


def digit_at(scene: Scene) -> list[Option]:
    return [
        Option(f"What digit is at {d.place}?", DIGITS[d.value], (DIGITS[d.value], d.place), (d.place,)) for d in scene.digits
    ]


def colour_at(scene: Scene) -> list[Option]:
    return [Option(f"What colour is at {d.place}?", d.colour, (d.colour, d.place), (d.place,)) for d in scene.digits]


def count(scene: Scene) -> list[Option]:
    number = NUMBERS[len(scene.digits)]
    return [Option("How many digits are there?", number, (number,))]


def count_colour(scene: Scene) -> list[Option]:
    found = Counter(d.colour for d in scene.digits)
    return [
        Option(f"How many {c} digits are there?", NUMBERS[found[c]], (NUMBERS[found[c]], c), _coloured(scene, c))
        for c in scene.colours
    ]


def exist(scene: Scene) -> list[Option]:
    """Yes and no evenly, and each colour evenly in both, as POPE balances them."""
    words, there = {True: "yes", False: "no"}, {d.colour for d in scene.digits}
    return [
        Option(f"Is there a {c} digit?", words[c in there], (words[c in there], c), _coloured(scene, c)) for c in scene.colours
    ]


def largest(scene: Scene) -> list[Option]:
    values = [d.value for d in scene.digits]
    ends = {"largest": DIGITS[max(values)], "smallest": DIGITS[min(values)]}
    return [Option(f"What is the {end} digit?", word, (word, end)) for end, word in ends.items()]


def where(scene: Scene) -> list[Option]:
    found = Counter(d.colour for d in scene.digits)
    once = [d for d in scene.digits if found[d.colour] == 1]
    return [Option(f"Where is the {d.colour} digit?", d.place, (d.place, d.colour), (d.place,)) for d in once]


def list_all(scene: Scene) -> list[Option]:
    answer = " ".join(DIGITS[d.value] for d in scene.digits)
    return [Option("Which digits are there?", answer, (NUMBERS[len(scene.digits)],))]


def add(scene: Scene) -> list[Option]:
    pairs = permutations(scene.digits, 2)
    return [
        Option(f"What is {a.place} plus {b.place}?", total, (total,), (a.place, b.place))
        for a, b in pairs
        for total in [NUMBERS[a.value + b.value]]
    ]


def _coloured(scene: Scene, colour: str) -> tuple[str, ...]:
    return tuple(d.place for d in scene.digits if d.colour == colour)


KINDS: dict[str, Callable[[Scene], list[Option]]] = {
    "digit_at": digit_at,
    "colour_at": colour_at,
    "count": count,
    "count_colour": count_colour,
    "exist": exist,
    "largest": largest,
    "where": where,
    "list": list_all,
    "sum": add,
}


def captions(scene: Scene) -> list[tuple[str, str]]:
    """What models learn first: CAPTIONS questions whose answers describe the image.

    The first has every cell in three words, so that word 3i of each such caption is about cell i: easy to align. The others
    name a place and say what is there, for all digits and for those of two colours: dense practice, without which no lookup by
    place or by colour was learnt in any time that we had (docs/log.md).
    """
    things = {d.place: f"{d.colour} {DIGITS[d.value]}" for d in scene.digits}
    described = [("Describe the grid.", " ".join(f"{place} {things.get(place, 'empty cell')}" for place in scene.places))]
    described.append(("List the digits.", " ".join(f"{place} {thing}" for place, thing in things.items())))
    for colour in list(dict.fromkeys(d.colour for d in scene.digits))[: CAPTIONS - 2]:
        found = " ".join(f"{d.place} {DIGITS[d.value]}" for d in scene.digits if d.colour == colour)
        described.append((f"List the {colour} digits.", found))
    return described


# --- the choice -------------------------------------------------------------------------------------------------------


class Balance:
    """How often each kind, and each stratum of it, was used so far in one split."""

    def __init__(self) -> None:
        self._used: Counter[tuple[str, ...]] = Counter()

    def kinds(self, rng: np.random.Generator) -> list[str]:
        """All kinds, the least used first, ties at random."""
        return sorted(KINDS, key=lambda kind: (self._used[kind,], rng.random()))

    def rarest(self, kind: str, options: list[Option], rng: np.random.Generator) -> Option:
        """The option of the least used coarse stratum, among those of the least used finer one, ..., then at random."""
        for depth in range(1, max(len(option.strata) for option in options) + 1):
            uses = [self._used[kind, *option.strata[:depth]] for option in options]
            least = min(uses)
            options = [option for option, used in zip(options, uses, strict=True) if used == least]
        return options[rng.integers(len(options))]

    def record(self, kind: str, option: Option) -> None:
        path = (kind, *option.strata)
        self._used.update(path[:end] for end in range(1, len(path) + 1))


def ask(scene: Scene, amount: int, balance: Balance, rng: np.random.Generator) -> list[Asked]:
    """`amount` different questions, of different kinds as far as there are enough.

    Raises DataError if so many cannot be asked.
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
