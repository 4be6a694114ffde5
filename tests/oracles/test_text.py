"""Text metrics against published examples and plain definitions."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.evaluate.scorers import anls, edit_distance, relaxed
from tests.oracles.scoring import best
from tests.oracles.text import contained, contained_formula, exact

WORD = st.text(alphabet="abc ", max_size=7)


@pytest.mark.parametrize(
    ("answer", "reference", "worth"),
    [
        ("Yes.", "yes", 1),
        ("  no ", "no", 1),
        ("the dog", "dog", 0),
        ("", "no", 0),
        ("ja", "yes", 0),
        ("dog. It barks", "dog", 0),
    ],
)
def test_exact_forgives_case_and_the_final_period(answer: str, reference: str, worth: float) -> None:
    assert exact(answer, [reference]) == worth


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("kitten", "sitting", 3), ("saturday", "sunday", 3), ("", "abc", 3), ("abc", "abc", 0)],  # Wikipedia, Levenshtein distance
)
def test_edit_distance_of_the_textbook(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == distance


@given(WORD, WORD)
def test_edit_distance_equals_the_recursion(first: str, second: str) -> None:
    def plain(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(plain(a[1:], b) + 1, plain(a, b[1:]) + 1, plain(a[1:], b[1:]) + (a[0] != b[0]))

    first, second = first[:5], second[:5]
    assert edit_distance(first, second) == plain(first, second)


@pytest.mark.parametrize(
    ("answer", "references", "worth"),
    [
        ("Grundig", ["grundig"], 1.0),
        ("Silver  Spoon", ["silver spoon"], 1.0),
        ("grundik", ["grundig"], 1 - 1 / 7),
        ("grundik", ["other", "grundig"], 1 - 1 / 7),  # the best reference counts
        ("ab", ["ac"], 0.0),  # NL = 0.5 is not below the threshold (Biten et al., equation 1)
        ("", ["grundig"], 0.0),
        ("The brand that is written on this old radio is Grundig", ["grundig"], 0.0),  # verbose
    ],
)
def test_anls_by_hand(answer: str, references: list[str], worth: float) -> None:
    assert best(anls, answer, references) == pytest.approx(worth)


@given(WORD, WORD)
def test_anls_short_cut_by_length_changes_nothing(answer: str, reference: str) -> None:
    a, b = " ".join(answer.split()), " ".join(reference.split())
    nl = edit_distance(a, b) / max(len(a), len(b)) if a or b else 0.0
    assert anls(answer, reference) == pytest.approx(1 - nl if nl < 0.5 else 0.0)


@pytest.mark.parametrize(
    ("answer", "reference", "worth"),
    [  # ChartQA, section 5.1: 5% on numbers, else exact
        ("104.9", "100", 1),
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("12%", "0.12", 1),
        ("12%", "12", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),  # no relative error of zero
        ("Blue", "blue", 1),
        ("light blue", "blue", 0),
        ("2015", "2016", 1),  # a year is a number to this metric: known, and criticised
        ("nan", "3", 0),
        ("about 100", "100", 0),
        ("", "100", 0),
    ],
)
def test_relaxed_accuracy(answer: str, reference: str, worth: float) -> None:
    assert relaxed(answer, reference) == worth


def test_ocrbench_looks_for_the_reference_in_the_answer() -> None:
    assert contained("The word is CENTRE.", ["centre", "center"]) == 1
    assert contained("cent", ["centre"]) == contained("", ["centre"]) == 0
    assert contained_formula("x ^ 2 + Y", ["x^2+Y"]) == 1
    assert contained_formula("x^2+y", ["x^2+Y"]) == 0


def test_an_answer_of_100_kb_is_scored_at_once_and_wrong() -> None:
    start = time.perf_counter()
    huge = "seven " * 20_000
    assert anls(huge, "seven") == relaxed(huge, "seven") == exact(huge, ["seven"]) == 0
    assert time.perf_counter() - start < 1
