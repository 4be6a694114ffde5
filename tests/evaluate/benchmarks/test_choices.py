"""Which option an answer names, by two published rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.evaluate.benchmarks.choices import letter_scienceqa, letter_vlmeval, lettered, rotations, shuffled

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


@given(st.lists(st.text("abcd", min_size=1, max_size=3), min_size=1, max_size=6, unique=True), st.integers(0, 99))
def test_orders_hold_every_option_once(options: list[str], seed: int) -> None:
    orders = rotations(options)
    assert len(orders) == len(options) and orders[0] == options
    assert {order[0] for order in orders} == set(options)  # each is first once
    drawn = shuffled(options, seed)
    assert sorted(drawn) == sorted(options) and drawn == shuffled(options, seed)


def test_letters_stand_for_the_options_in_order() -> None:
    assert lettered(["x", "y"]) == {"A": "x", "B": "y"}
    assert len({tuple(shuffled("abcd", seed)) for seed in range(30)}) > 10
