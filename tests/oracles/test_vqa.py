"""VQA accuracy and its two normalisers."""

from __future__ import annotations

import pytest

from components.errors import DataError
from tests.oracles.vqa import CONTRACTIONS, accuracy, normalise, normalise_m4c


@pytest.mark.parametrize(("given", "worth"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_ten_answer_rule(given: int, worth: float) -> None:
    """https://visualqa.org/evaluation.html: averaged over all 10 choose 9 sets of human annotators."""
    people = ["red"] * given + [f"other{i}" for i in range(10 - given)]
    assert accuracy("Red", people, normalise) == pytest.approx(worth)


def test_one_reference_alone_is_matched_or_not() -> None:
    assert accuracy("Two", ["2"], normalise) == 1
    assert accuracy("three", ["2"], normalise) == 0
    with pytest.raises(DataError, match="no"):
        accuracy("two", [], normalise)


@pytest.mark.parametrize(
    ("text", "plain"),
    [  # what the official evaluator (GT-Vision-Lab/VQA, vqaEval.py) makes of them
        ("The Two dogs", "2 dogs"),
        ("a", ""),
        ("none", "0"),
        ("dont", "don't"),
        ("shouldnt've", "shouldn't've"),
        ("Its  a\tdog.\n", "its dog"),
        ("3.5", "3.5"),
        ("end.", "end"),
        ("1,000", "1000"),
        ("red-blue", "red blue"),
        ("red - blue", "red blue"),
        ("what?", "what"),
        ("somebody'd", "somebodyd"),  # oddity: this one goes the other way
        ("shes", "shes"),  # oddity: the table maps she's to itself
    ],
)
def test_the_official_normalisation(text: str, plain: str) -> None:
    assert normalise(text) == plain


def test_m4c_parts_the_possessive_and_drops_commas_first() -> None:
    assert normalise_m4c("Joe's, bar?") == "joe 's bar"
    assert normalise("Joe's, bar?") == "joe's bar"


def test_the_table_of_contractions_is_the_official_one_in_number() -> None:
    assert len(CONTRACTIONS) == 114  # those of the official table that change a word in lower case
    assert all(short.replace("'", "") == full.replace("'", "") for short, full in CONTRACTIONS.items())
