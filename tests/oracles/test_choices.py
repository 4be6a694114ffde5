"""Which option an answer names, by two published rules."""

from __future__ import annotations

import pytest

from components.evaluate.scorers import letter_vlmeval
from tests.oracles.choices import letter_scienceqa

OPTIONS = {"A": "cat", "B": "teddy bear", "C": "spider"}


@pytest.mark.parametrize(
    ("answer", "scienceqa", "vlmeval"),
    [
        ("B", "B", "B"),
        ("B. teddy bear", "B", "B"),
        ("The answer is B.", "B", "B"),
        ("(B)", None, "B"),
        ("B)", None, "B"),
        ("b", None, None),  # lower case names nothing, by either
        ("teddy bear", None, "B"),
        ("It is a Teddy Bear", None, "B"),
        ("cat or spider", None, None),
        ("A B", None, None),
        ("D", None, None),  # not on offer
        ("", None, None),
        ("Die Antwort ist ein Bär", None, None),
        ("I think that A cat is what the picture shows here", None, None),  # the article, too far from the end
        ("A spider", None, "A"),  # the kit takes the article for the letter
        ("B. I am sure, since it has round ears and is soft", "B", None),
        ("Cannot determine the answer B", None, None),
    ],
)
def test_letters_in_prose(answer: str, scienceqa: str | None, vlmeval: str | None) -> None:
    assert letter_scienceqa(answer, OPTIONS) == scienceqa
    assert letter_vlmeval(answer, OPTIONS) == vlmeval
