"""Questions about hand-made scenes, whose answers are known, and about random ones."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.digits.questions import KINDS, NUMBERS, Balance, Digit, Scene, captions, cell_names, choose_questions
from components.errors import DataError

COLOURS = ("blue", "green", "red")
SCENE = Scene(
    cell_names(3),
    (Digit("a1", 3, "red", 0), Digit("c1", 7, "blue", 1), Digit("b2", 3, "blue", 2), Digit("c3", 0, "red", 3)),
)


def answers(kind: str, scene: Scene = SCENE) -> dict[str, str]:
    return {option.question: option.answer for option in KINDS[kind](scene)}


def test_places_are_read_row_by_row() -> None:
    assert cell_names(3) == ("a1", "b1", "c1", "a2", "b2", "c2", "a3", "b3", "c3")


def test_rows_and_columns_of_a_grid() -> None:
    assert SCENE.lines["row two"] == ("a2", "b2", "c2") and SCENE.lines["column c"] == ("c1", "c2", "c3")
    assert len(SCENE.lines) == 6


def test_each_kind_on_a_known_scene() -> None:
    assert answers("digit") == {
        "What digit is at a1?": "a1 three",
        "What digit is at c1?": "c1 seven",
        "What digit is at b2?": "b2 three",
        "What digit is at c3?": "c3 zero",
    }
    assert answers("larger")["Which is larger, a1 or c1?"] == "a1 three and c1 seven so seven"
    assert answers("sum")["What is c1 plus b2?"] == "c1 seven plus b2 three is ten"
    assert answers("difference")["How far apart are b2 and c1?"] == "b2 three and c1 seven so four"
    assert answers("extreme") == {
        "What is the largest digit in row one?": "a1 three b1 empty c1 seven so seven",
        "What is the smallest digit in row one?": "a1 three b1 empty c1 seven so three",
        "What is the largest digit in column c?": "c1 seven c2 empty c3 zero so seven",
        "What is the smallest digit in column c?": "c1 seven c2 empty c3 zero so zero",
    }
    assert answers("count")["How many digits are in row one?"] == "a1 three b1 empty c1 seven so two"
    assert answers("count")["How many digits are in column b?"] == "b1 empty b2 three b3 empty so one"
    assert answers("colours")["Which colours are in column c?"] == "c1 blue c2 empty c3 red"
    assert answers("describe")["Describe row two."] == "a2 empty b2 three c2 empty then a2 empty b2 blue c2 empty"
    assert len(answers("describe")) == 6


def test_captions_of_a_known_scene() -> None:
    assert captions(SCENE) == [
        (
            "Describe the rows.",
            "a1 red three b1 empty cell c1 blue seven a2 empty cell b2 blue three c2 empty cell"
            " a3 empty cell b3 empty cell c3 red zero",
        ),
        (
            "Describe the columns.",
            "a1 red three a2 empty cell a3 empty cell b1 empty cell b2 blue three b3 empty cell"
            " c1 blue seven c2 empty cell c3 red zero",
        ),
    ]


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    grid = draw(st.integers(1, 5))
    names = cell_names(grid)
    cells = sorted(draw(st.sets(st.integers(0, grid**2 - 1), min_size=1, max_size=18)))
    digits = [Digit(names[c], draw(st.integers(0, 9)), draw(st.sampled_from(COLOURS)), 0) for c in cells]
    return Scene(names, tuple(digits))


@given(scenes(), st.integers(2, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=150)
def test_questions_of_an_image_are_all_different_and_their_answers_short(scene: Scene, amount: int, seed: int) -> None:
    questions = choose_questions(scene, amount, Balance(), np.random.default_rng(seed))
    assert len(questions) == amount == len({item.question for item in questions})
    legal = {"empty", "then", "and", "so", "plus", "is", *NUMBERS, *COLOURS, *scene.cells}
    for kind, question, answer, cells in questions:
        assert {*cells} <= {*scene.cells}
        assert {*cells} == {word for word in answer.split() if word in scene.cells}  # it names where it looks
        assert KINDS[kind](scene)  # the kind can be asked here
        assert answers(kind, scene)[question] == answer
        assert set(answer.split()) <= legal
    assert len({item.kind for item in questions}) == min(amount, sum(bool(function(scene)) for function in KINDS.values()))


def test_more_questions_than_there_are_is_an_error() -> None:
    lonely = Scene(cell_names(1), (Digit("a1", 3, "red", 0),))
    with pytest.raises(DataError, match="too many"):
        choose_questions(lonely, 100, Balance(), np.random.default_rng(0))


def test_the_choice_evens_out_even_what_scenes_do_not_offer_evenly() -> None:
    rng, balance = np.random.default_rng(0), Balance()
    skewed = [
        Scene(cell_names(3), tuple(Digit(p, int(rng.integers(7, 10)), "red", 0) for p in cell_names(3)[: rng.integers(3, 9)]))
        for _ in range(300)
    ]
    endings: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for scene in skewed:
        for kind, _, answer, _ in choose_questions(scene, 5, balance, rng):
            endings[kind][answer.split()[-1]] += 1
    assert max(endings["digit"].values()) - min(endings["digit"].values()) <= 2
    assert max(endings["sum"].values()) - min(endings["sum"].values()) <= 2
