"""Every benchmark's protocol on planted answers whose score is known by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from components.errors import DataError
from components.evaluate.benchmarks import BENCHMARKS, PAPER
from tests.oracles.scoring import COGNITION, PERCEPTION, SCORERS, Answer, score

OPTIONS = {"A": "red", "B": "green", "C": "blue", "D": "grey"}
CLOSED = [(f"image{i}", reference) for i in range(4) for reference in ("yes", "no")]


def closed(answer: Callable[[str], str], category: str = "") -> list[Answer]:
    """Two questions about each of four images, one answered by yes and one by no."""
    return [Answer(answer(ref), (ref,), image=i, question=f"{i}{ref}", category=category) for i, ref in CLOSED]


def choices(answer: Callable[[str], str]) -> list[Answer]:
    """Each of four questions in its four orders: the right letter is each letter once."""
    return [Answer(answer(letter), (letter,), OPTIONS, question=f"q{q}") for q in range(4) for letter in OPTIONS]


def texts(answer: Callable[[str], str]) -> list[Answer]:
    return [Answer(answer(word), (word,) * 10) for word in ("red", "seven", "3.5", "teddy bear")]


def pope(answer: Callable[[str], str]) -> list[Answer]:
    return [a for split in ("random", "popular", "adversarial") for a in closed(answer, split)]


def mme(answer: Callable[[str], str]) -> list[Answer]:
    return [a for task in PERCEPTION + COGNITION for a in closed(answer, task)]


PLANTED: dict[str, Callable[[str], str]] = {
    "perfect": lambda r: r,
    "empty": lambda r: "",
    "all yes": lambda r: "Yes",
    "all A": lambda r: "A",
    "verbose": lambda r: f"I have looked at this picture for a while and what I can say of it with confidence is {r}",
    "in prose": lambda r: f"The answer is {r}.",
    "foreign": lambda r: "Ich weiß es nicht",
}
F1 = 200 / 3  # all yes where half the answers are: precision 1/2, recall 1

# the score of each of PLANTED, in its order
LETTERS = (100, 0, 0, 25, 100, 100, 0)  # the right letter is each letter once
CASES = {
    "gqa": (texts, (100, 0, 0, 0, 0, 0, 0)),
    "textvqa": (texts, (100, 0, 0, 0, 0, 0, 0)),
    "chartqa": (texts, (100, 0, 0, 0, 0, 0, 0)),
    "ocrbench": (texts, (100, 0, 0, 0, 100, 100, 0)),  # looks for the reference within the answer, so prose does not hurt
    "sqa": (choices, (100, 0, 0, 25, 0, 100, 0)),  # of all prose it reads `The answer is A.` alone
    **dict.fromkeys(("mmstar", "mmmu", "ai2d", "seed", "realworldqa", "mvbench", "video_mme"), (choices, LETTERS)),
    "mmb": (choices, (100, 0, 0, 0, 100, 100, 0)),  # all A is right in one order of four, hence in none
    "pope": (pope, (100, F1, F1, F1, 100, 100, F1)),  # takes for yes whatever does not say no
    "mme": (mme, (100, 0, 25, 0, 0, 0, 0)),  # reads four letters; all yes: accuracy 50, accuracy+ 0 in ten tasks: 500 of 2000
    "hallusion": (closed, (100, 0, 100 / 3, 0, 100, 100, 0)),  # all yes: half the answers, half the questions, no figure
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_planted_answers_have_the_score_known_by_hand(name: str) -> None:
    planted, expected = CASES[name]
    metric = BENCHMARKS[name].metric
    scores = {case: score(metric, planted(answer))["score"] for case, answer in PLANTED.items()}
    assert scores == pytest.approx(dict(zip(PLANTED, expected, strict=True)))


def test_the_kit_s_pope_differs_from_the_paper_s() -> None:
    assert score("pope", pope(PLANTED["empty"]))["yes_ratio"] == 100
    assert score("pope_vlmeval", pope(PLANTED["empty"])) == {"score": 0.0, "accuracy": 0.0, "yes_ratio": 0.0}
    once = [Answer("yes", ("yes",), category="random,popular"), Answer("yes", ("no",), category="random")]
    # the first counts in both splits: F1 of random 2/3, of popular 1; pooled over three rows 2 * 2 / (3 + 2)
    assert score("pope", once)["score"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert score("pope_vlmeval", once)["score"] == pytest.approx(80)


def test_mme_counts_a_picture_only_if_both_answers_are_right() -> None:
    half = [Answer("yes", ("yes",), image="i", category="OCR"), Answer("yes", ("no",), image="i", category="OCR")]
    assert score("mme", half)["OCR"] == 50
    both = [Answer("yes", ("yes",), image="i", category="OCR"), Answer("no", ("no",), image="i", category="OCR")]
    assert score("mme", both)["OCR"] == 200
    assert score("mme", both)["perception"] == 200 and score("mme", both)["score"] == 10


def test_circular_evaluation_is_never_above_the_plain_one() -> None:
    one_wrong = [Answer("A" if q == "q0" and r == "B" else r, (r,), OPTIONS, question=q) for q in ("q0", "q1") for r in OPTIONS]
    figures = score("choice_circular", one_wrong)
    assert figures["accuracy"] == pytest.approx(100 * 7 / 8) and figures["score"] == 50


def test_answers_that_name_no_option_are_counted() -> None:
    assert score("choice_vlmeval", choices(PLANTED["foreign"]))["unread"] == 100


def test_what_cannot_be_scored_is_refused() -> None:
    for metric in SCORERS:
        with pytest.raises(DataError, match="no answers"):
            score(metric, [])
    with pytest.raises(DataError, match="'E' is none of the options A, B, C, D"):
        score("choice_vlmeval", [Answer("A", ("E",), OPTIONS)])


def test_the_table_covers_the_paper_and_says_what_it_does_not_know() -> None:
    assert PAPER == ("gqa", "sqa", "textvqa", "pope", "mme", "mmb")
    for benchmark in BENCHMARKS.values():
        for field in ("items", "licence"):
            stated = getattr(benchmark, field) is not None
            assert stated or any(field in point for point in benchmark.open_points), (benchmark.title, field)
        assert benchmark.kit_dataset in benchmark.get


def test_every_metric_has_a_benchmark_or_a_test_of_its_own() -> None:
    used = {benchmark.metric for benchmark in BENCHMARKS.values()}
    assert set(SCORERS) - used == {"vqa", "anls", "pope_vlmeval"}
