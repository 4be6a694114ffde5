"""Scores of the field's benchmarks as their authors publish them, an oracle for the kits' figures.

Per answer by its reader, then over questions, images, orders or categories.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

from components.errors import DataError
from components.evaluate import scorers
from tests.oracles import choices, closed, text, vqa

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
FORMULAS = "Handwritten Mathematical Expression Recognition"


@dataclass(frozen=True)
class Answer:
    """One answer to one question of a benchmark."""

    answer: str
    references: tuple[str, ...]  # for multiple choice the right letter, for yes/no the word
    options: Mapping[str, str] = field(default_factory=dict)  # letter -> text
    image: str = ""  # MME: the two questions about one image; HallusionBench: the figure
    question: str = ""  # circular evaluation: one question in all its orders; HallusionBench: the question
    category: str = ""


def score(metric: str, answers: Sequence[Answer]) -> dict[str, float]:
    """The benchmark's figures, `score` being the one that tables show, in the benchmark's own unit (percent, or MME's points).

    Raises DataError if there is nothing to score or a choice has no right letter.
    """
    if not answers:
        raise DataError(f"{metric}: there are no answers to score")
    return SCORERS[metric](answers)


def mean_worth(worth: Callable[[str, Sequence[str]], float], answers: Sequence[Answer]) -> dict[str, float]:
    return {"score": 100 * fmean(worth(a.answer, a.references) for a in answers)}


def best(worth: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    """Worth of an answer by the reference that it is nearest to."""
    return max(worth(answer, reference) for reference in references)


def all_right(marks: Iterable[tuple[Hashable, bool]]) -> float:
    """Share of groups in which every mark is right: accuracy+, circular evaluation, accuracy per figure or question."""
    groups: dict[Hashable, bool] = defaultdict(lambda: True)
    for group, right in marks:
        groups[group] &= right
    return fmean(groups.values())


def _ocrbench(answers: Sequence[Answer]) -> dict[str, float]:
    """Right answers as a share of all; the published figure is their number, of 1,000."""
    right = ((text.contained_formula if a.category == FORMULAS else text.contained)(a.answer, a.references) for a in answers)
    return {"score": 100 * fmean(right)}


def _choice(
    letter: Callable[[str, Mapping[str, str]], str | None], circular: bool, answers: Sequence[Answer]
) -> dict[str, float]:
    marks = [_chosen(letter, a) for a in answers]
    unread = fmean(letter(a.answer, a.options) is None for a in answers)
    figures = {"accuracy": 100 * fmean(marks), "unread": 100 * unread}
    orders = all_right((a.question, right) for a, right in zip(answers, marks, strict=True))
    return {"score": 100 * orders if circular else figures["accuracy"], **figures}


def _chosen(letter: Callable[[str, Mapping[str, str]], str | None], answer: Answer) -> bool:
    if answer.references[0] not in answer.options:
        raise DataError(f"the right letter {answer.references[0]!r} is none of the options {', '.join(answer.options)}")
    return letter(answer.answer, answer.options) == answer.references[0]


def _f1(verdict: Callable[[str], str | None], by_category: bool, answers: Sequence[Answer]) -> dict[str, float]:
    """F1 with "yes" positive; `by_category`: the mean of the splits' (POPE: random, popular, adversarial), else one over all.

    The kit's file has a question once that stands in several splits, `random,popular`: it counts in each.
    """
    kinds: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
    for a in answers:
        for kind in a.category.split(","):
            kinds[kind if by_category else ""].append((verdict(a.answer), a.references[0].lower()))
    all_pairs = [pair for pairs in kinds.values() for pair in pairs]
    return {
        "score": 100 * fmean(_f1_of(pairs) for pairs in kinds.values()),
        "accuracy": 100 * fmean(verdict == true for verdict, true in all_pairs),
        "yes_ratio": 100 * fmean(verdict == "yes" for verdict, _ in all_pairs),
    }


def _f1_of(pairs: Sequence[tuple[str | None, str]]) -> float:
    hits = sum(predicted == true == "yes" for predicted, true in pairs)
    claimed = sum(predicted == "yes" for predicted, _ in pairs)
    positive = sum(true == "yes" for _, true in pairs)
    return 2 * hits / (claimed + positive) if claimed + positive else 0.0


def _mme(answers: Sequence[Answer]) -> dict[str, float]:
    """Per task accuracy + accuracy+ (both questions about the image right), 0..200; summed over tasks.

    `score` is perception as the paper states it: its ten tasks' sum / 2000 x 100.
    """
    tasks: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for a in answers:
        tasks[a.category].append((a.image, closed.verdict_mme(a.answer) == a.references[0].lower()))
    worth = {task: 100 * fmean(right for _, right in marks) + 100 * all_right(marks) for task, marks in tasks.items()}
    perception = sum(worth.get(task, 0.0) for task in PERCEPTION)
    cognition = sum(worth.get(task, 0.0) for task in COGNITION)
    return {"score": perception / 2000 * 100, "perception": perception, "cognition": cognition, **worth}


def _hallusion(answers: Sequence[Answer]) -> dict[str, float]:
    """Mean of the accuracies per answer, per figure and per question, as VLMEvalKit's leaderboard has it."""
    marks = [(a, closed.verdict_vlmeval(a.answer) == a.references[0].lower()) for a in answers]
    figures = {
        "aAcc": 100 * fmean(right for _, right in marks),
        "fAcc": 100 * all_right(((a.category, a.image), right) for a, right in marks),
        "qAcc": 100 * all_right(((a.category, a.question), right) for a, right in marks),
    }
    return {"score": fmean(figures.values()), **figures}


SCORERS: dict[str, Callable[[Sequence[Answer]], dict[str, float]]] = {
    "exact": partial(mean_worth, text.exact),
    "vqa": partial(mean_worth, partial(vqa.accuracy, normalise=vqa.normalise)),
    "vqa_m4c": partial(mean_worth, partial(vqa.accuracy, normalise=vqa.normalise_m4c)),
    "anls": partial(mean_worth, partial(best, scorers.anls)),
    "relaxed": partial(mean_worth, partial(best, scorers.relaxed)),
    "ocrbench": _ocrbench,
    "choice_scienceqa": partial(_choice, choices.letter_scienceqa, False),
    "choice_vlmeval": partial(_choice, scorers.letter_vlmeval, False),
    "choice_circular": partial(_choice, scorers.letter_vlmeval, True),
    "pope": partial(_f1, closed.verdict_pope, True),
    "pope_vlmeval": partial(_f1, closed.verdict_vlmeval, False),
    "mme": _mme,
    "hallusion": _hallusion,
}
