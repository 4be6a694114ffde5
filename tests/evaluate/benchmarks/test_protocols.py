"""Every benchmark's protocol on planted answers whose score is known by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from components.errors import DataError
from components.evaluate.benchmarks.scoring import COGNITION, PERCEPTION, SCORERS, Answer, score
from components.evaluate.benchmarks.table import BENCHMARKS, PAPER

OPTIONS = {"A": "red", "B": "green", "C": "blue", "D": "grey"}
CLOSED = [(f"image{i}", reference) for i in range(4) for reference in ("yes", "no")]


def closed(said: Callable[[str], str], category: str = "") -> list[Answer]:
    """Two questions about each of four images, one answered by yes and one by no."""
    return [Answer(said(ref), (ref,), image=i, question=f"{i}{ref}", category=category) for i, ref in CLOSED]


def choices(said: Callable[[str], str]) -> list[Answer]:
    """Each of four questions in its four orders: the right letter is each letter once."""
    return [Answer(said(letter), (letter,), OPTIONS, question=f"q{q}") for q in range(4) for letter in OPTIONS]


def texts(said: Callable[[str], str]) -> list[Answer]:
    return [Answer(said(word), (word,) * 10) for word in ("red", "seven", "3.5", "teddy bear")]


def pope(said: Callable[[str], str]) -> list[Answer]:
    return [a for split in ("random", "popular", "adversarial") for a in closed(said, split)]


def mme(said: Callable[[str], str]) -> list[Answer]:
    return [a for task in PERCEPTION + COGNITION for a in closed(said, task)]


def verbose(word: str) -> str:
    return f"I have looked at this picture for a while and what I can say about it with confidence is {word}"


PERFECT, EMPTY, YES, FOREIGN = (lambda r: r), (lambda r: ""), (lambda r: "Yes"), (lambda r: "Ich weiß es nicht")
F1 = 200 / 3
A = lambda r: "A"  # noqa: E731

CASES = {
    "gqa": (texts, {"perfect": (PERFECT, 100), "empty": (EMPTY, 0), "verbose": (verbose, 0), "foreign": (FOREIGN, 0)}),
    "textvqa": (texts, {"perfect": (PERFECT, 100), "empty": (EMPTY, 0), "verbose": (verbose, 0), "foreign": (FOREIGN, 0)}),
    "chartqa": (texts, {"perfect": (PERFECT, 100), "empty": (EMPTY, 0), "verbose": (verbose, 0), "foreign": (FOREIGN, 0)}),
    # OCRBench looks for the reference within the answer, so prose does not hurt
    "ocrbench": (texts, {"perfect": (PERFECT, 100), "empty": (EMPTY, 0), "verbose": (verbose, 100), "foreign": (FOREIGN, 0)}),
    "sqa": (choices, {"perfect": (PERFECT, 100), "all A": (A, 25), "empty": (EMPTY, 0), "verbose": (verbose, 0)}),
    "mmstar": (choices, {"perfect": (PERFECT, 100), "all A": (A, 25), "empty": (EMPTY, 0), "letter in prose": (verbose, 100)}),
    # every question has its right letter at each place once: all A is right in one order of four, hence in none
    "mmb": (choices, {"perfect": (PERFECT, 100), "all A": (A, 0), "empty": (EMPTY, 0), "letter in prose": (verbose, 100)}),
    # all yes: precision 1/2, recall 1, F1 2/3. POPE takes silence and what is not English for yes
    "pope": (pope, {"perfect": (PERFECT, 100), "all yes": (YES, F1), "empty": (EMPTY, F1), "foreign": (FOREIGN, F1)}),
    # all yes: accuracy 50, accuracy+ 0 in each of ten tasks: 500 of 2000
    "mme": (mme, {"perfect": (PERFECT, 100), "all yes": (YES, 25), "empty": (EMPTY, 0), "verbose": (verbose, 0)}),
    # all yes: half the answers, no figure (each has a no), half the questions
    "hallusion": (closed, {"perfect": (PERFECT, 100), "all yes": (YES, 100 / 3), "empty": (EMPTY, 0), "foreign": (FOREIGN, 0)}),
}  # fmt: skip
LIKE = dict.fromkeys(("mmmu", "ai2d", "seed", "realworldqa", "mvbench", "video_mme"), "mmstar")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_planted_answers_have_the_score_known_by_hand(name: str) -> None:
    planted, cases = CASES[LIKE.get(name, name)]
    for what, (said, expected) in cases.items():
        assert score(BENCHMARKS[name].metric, planted(said))["score"] == pytest.approx(expected), what


def test_the_kit_s_pope_differs_from_the_paper_s() -> None:
    assert score("pope", pope(EMPTY))["yes_ratio"] == 100
    assert score("pope_vlmeval", pope(EMPTY)) == {"score": 0.0, "accuracy": 0.0, "yes_ratio": 0.0}
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
    assert score("choice_vlmeval", choices(FOREIGN))["unread"] == 100


def test_what_cannot_be_scored_is_refused() -> None:
    for metric in SCORERS:
        with pytest.raises(DataError, match="no answers"):
            score(metric, [])
    with pytest.raises(DataError, match="'E' is none of the options A, B, C, D"):
        score("choice_vlmeval", [Answer("A", ("E",), OPTIONS)])


def test_the_table_covers_the_paper_and_says_what_it_does_not_know() -> None:
    assert PAPER == ("gqa", "sqa", "textvqa", "pope", "mme", "mmb")
    for benchmark in BENCHMARKS.values():
        for field in ("items", "licence", "size_mb"):
            known = getattr(benchmark, field) is not None
            word = "size" if field == "size_mb" else field
            assert known or any(word in point for point in benchmark.open_points), (benchmark.title, field)
        assert benchmark.kit_dataset in str(benchmark.lands) and benchmark.get
        assert (benchmark.address is None) == (benchmark.md5 is None)


def test_every_metric_has_a_benchmark_or_a_test_of_its_own() -> None:
    used = {benchmark.metric for benchmark in BENCHMARKS.values()}
    assert set(SCORERS) - used == {"vqa", "anls", "pope_vlmeval"}
