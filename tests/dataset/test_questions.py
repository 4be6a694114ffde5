"""Questions about hand-made scenes, whose answers are known, and about random ones."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.dataset.questions import KINDS, NUMBERS, Balance, Digit, Scene, ask, caption, places
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
    assert answers("where") == {
        "Where is the red three?": "a1",
        "Where is the blue seven?": "c1",
        "Where is the blue three?": "b2",
        "Where is the red zero?": "c3",
    }
    assert answers("list") == {"List the digits.": "a1 three c1 seven b2 three c3 zero"}
    assert answers("compare")["Is c1 larger than a1?"] == "yes"
    assert answers("compare")["Is a1 larger than c1?"] == "no"
    assert "Is a1 larger than b2?" not in answers("compare")  # equal: neither answer would be fair
    assert answers("sum")["What is c1 plus b2?"] == "ten"
    assert caption(SCENE)[1] == (
        "a1 red three b1 empty cell c1 blue seven a2 empty cell b2 blue three c2 empty cell"
        " a3 empty cell b3 empty cell c3 red zero"
    )


def test_existence_has_three_grades_of_no() -> None:
    grades = {option.question: option.strata[:2] for option in KINDS["exist"](SCENE)}
    assert grades["Is there a red three?"] == ("yes", "red three")
    assert grades["Is there a red seven?"] == ("no", "adversarial")  # a red one and a seven are there
    assert grades["Is there a red five?"] == ("no", "popular")  # a red one is there
    assert grades["Is there a green seven?"] == ("no", "popular")  # a seven is there
    assert grades["Is there a green five?"] == ("no", "random")


def test_where_skips_what_is_there_twice() -> None:
    twice = Scene(places(2), COLOURS, (Digit("a1", 3, "red", 0), Digit("b1", 3, "red", 1), Digit("a2", 4, "red", 2)))
    assert answers("where", twice) == {"Where is the red four?": "a2"}


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    grid = draw(st.integers(1, 5))
    names = places(grid)
    cells = sorted(draw(st.sets(st.integers(0, grid**2 - 1), min_size=1, max_size=18)))
    digits = [Digit(names[c], draw(st.integers(0, 9)), draw(st.sampled_from(COLOURS)), 0) for c in cells]
    return Scene(names, COLOURS, tuple(digits))


@given(scenes(), st.integers(2, 14), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_questions_of_an_image_are_all_different_and_their_answers_short(scene: Scene, amount: int, seed: int) -> None:
    asked = ask(scene, amount, Balance(), np.random.default_rng(seed))
    assert len(asked) == amount == len({question for _, question, _ in asked})
    legal = {"yes", "no", *NUMBERS, *COLOURS, *scene.places}
    for kind, question, answer in asked:
        assert KINDS[kind](scene)  # the kind can be asked here
        assert answers(kind, scene)[question] == answer
        assert set(answer.split()) <= legal
        assert kind == "list" or len(answer.split()) == 1
    if amount <= sum(bool(function(scene)) for function in KINDS.values()):
        assert len({kind for kind, _, _ in asked}) == amount  # of different kinds, as there are enough


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
        for kind, _, answer in ask(scene, 5, balance, rng):
            found[kind][answer] += 1
    for kind in ("exist", "compare"):
        assert abs(found[kind]["yes"] - found[kind]["no"]) <= 2
    assert max(found["digit_at"].values()) - min(found["digit_at"].values()) <= 2


def test_the_grades_of_no_come_in_thirds() -> None:
    rng, balance = np.random.default_rng(0), Balance()
    grades: Counter[str] = Counter()
    for _ in range(200):
        chosen = rng.permutation(9)[:5]
        scene = Scene(
            places(3), COLOURS, tuple(Digit(places(3)[c], int(rng.integers(5)), COLOURS[c % 2], 0) for c in sorted(chosen))
        )
        graded = {option.question: option.strata[1] for option in KINDS["exist"](scene) if option.answer == "no"}
        grades.update(graded[question] for _, question, _ in ask(scene, 10, balance, rng) if question in graded)
    assert set(grades) == {"random", "popular", "adversarial"}
    assert max(grades.values()) - min(grades.values()) <= 2
