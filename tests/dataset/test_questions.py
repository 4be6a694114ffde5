"""Questions about hand-made scenes, whose answers are known, and about random ones."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.dataset.questions import KINDS, NUMBERS, Balance, Digit, Scene, ask, captions, places
from components.errors import DataError

COLOURS = ("blue", "green", "red")
SCENE = Scene(
    places(3),
    COLOURS,
    (Digit("a1", 3, "red", 0), Digit("c1", 7, "blue", 1), Digit("b2", 3, "blue", 2), Digit("c3", 0, "red", 3)),
)


def answers(kind: str, scene: Scene = SCENE) -> dict[str, str]:
    return {option.question: option.answer for option in KINDS[kind](scene)}


def test_places_are_read_row_by_row() -> None:
    assert places(3) == ("a1", "b1", "c1", "a2", "b2", "c2", "a3", "b3", "c3")


def test_each_kind_on_a_known_scene() -> None:
    assert answers("digit_at") == {
        "What digit is at a1?": "three",
        "What digit is at c1?": "seven",
        "What digit is at b2?": "three",
        "What digit is at c3?": "zero",
    }
    assert answers("colour_at")["What colour is at c1?"] == "blue"
    assert answers("count") == {"How many digits are there?": "four"}
    assert answers("count_colour") == {
        "How many blue digits are there?": "two",
        "How many green digits are there?": "zero",
        "How many red digits are there?": "two",
    }
    assert answers("largest") == {"What is the largest digit?": "seven", "What is the smallest digit?": "zero"}
    assert answers("exist") == {
        "Is there a blue digit?": "yes",
        "Is there a green digit?": "no",
        "Is there a red digit?": "yes",
    }
    assert answers("list") == {"Which digits are there?": "three seven three zero"}
    assert answers("sum")["What is c1 plus b2?"] == "ten"


def test_captions_of_a_known_scene() -> None:
    assert captions(SCENE) == [
        (
            "Describe the grid.",
            "a1 red three b1 empty cell c1 blue seven a2 empty cell b2 blue three c2 empty cell"
            " a3 empty cell b3 empty cell c3 red zero",
        ),
        ("List the digits.", "a1 red three c1 blue seven b2 blue three c3 red zero"),
        ("List the red digits.", "a1 three c3 zero"),
        ("List the blue digits.", "c1 seven b2 three"),
    ]


def test_where_skips_a_colour_that_is_there_twice() -> None:
    scene = Scene(places(2), COLOURS, (Digit("a1", 3, "red", 0), Digit("b1", 5, "red", 1), Digit("a2", 4, "blue", 2)))
    assert answers("where", scene) == {"Where is the blue digit?": "a2"}


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    grid = draw(st.integers(1, 5))
    names = places(grid)
    cells = sorted(draw(st.sets(st.integers(0, grid**2 - 1), min_size=1, max_size=18)))
    digits = [Digit(names[c], draw(st.integers(0, 9)), draw(st.sampled_from(COLOURS)), 0) for c in cells]
    return Scene(names, COLOURS, tuple(digits))


@given(scenes(), st.integers(2, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_questions_of_an_image_are_all_different_and_their_answers_short(scene: Scene, amount: int, seed: int) -> None:
    asked = ask(scene, amount, Balance(), np.random.default_rng(seed))
    assert len(asked) == amount == len({one.question for one in asked})
    legal = {"yes", "no", *NUMBERS, *COLOURS, *scene.places}
    for kind, question, answer, cells in asked:
        assert {*cells} <= {*scene.places}
        assert KINDS[kind](scene)  # the kind can be asked here
        assert answers(kind, scene)[question] == answer
        assert set(answer.split()) <= legal
        assert kind == "list" or len(answer.split()) == 1
    if amount <= sum(bool(function(scene)) for function in KINDS.values()):
        assert len({one.kind for one in asked}) == amount  # of different kinds, as there are enough


def test_more_questions_than_there_are_is_an_error() -> None:
    lonely = Scene(places(1), ("red",), (Digit("a1", 3, "red", 0),))
    with pytest.raises(DataError, match="too many"):
        ask(lonely, 100, Balance(), np.random.default_rng(0))


def test_the_choice_evens_out_even_what_scenes_do_not_offer_evenly() -> None:
    rng, balance = np.random.default_rng(0), Balance()
    skewed = [
        Scene(places(3), COLOURS, tuple(Digit(p, int(rng.integers(7, 10)), "red", 0) for p in places(3)[: rng.integers(3, 9)]))
        for _ in range(300)
    ]
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for scene in skewed:
        for kind, _, answer, _ in ask(scene, 5, balance, rng):
            found[kind][answer] += 1
    assert abs(found["exist"]["yes"] - found["exist"]["no"]) <= 2
    assert max(found["digit_at"].values()) - min(found["digit_at"].values()) <= 2
