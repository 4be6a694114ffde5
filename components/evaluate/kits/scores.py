"""Scores of one kit for one model, beside our own metrics on the same answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from components.evaluate.metrics import normalise
from components.records.evaluate import Fingerprint, Prediction
from components.records.record import Record


@dataclass(frozen=True)
class Measured:
    """What a kit made of the split: per row its answer and, where the kit has a judge for it, its verdict."""

    answers: dict[int, str]
    verdicts: dict[int, bool]
    figures: dict[str, float]  # what else was measured
    failed: dict[int, str] = field(default_factory=dict)  # rows that the server would not answer, and what it said
    overlong: list[int] = field(default_factory=list)


class Verdict(Record):
    """An answer that the kit's judge and ours see differently."""

    id: str
    kind: str
    reference: str
    answer: str  # its first 200 characters
    kit: bool
    ours: bool


class KitScores(Record):
    """One model measured one way. Every share counts what was not answered as wrong."""

    arm: str
    kit: str  # "own", "vlmeval", "lm-eval"
    model: str  # sha256 over its folder
    samples: int
    exact_match: float  # share that is right, by the kit's judge where it has one for the kind
    per_kind: dict[str, float]
    ours: dict[str, float]  # per kind, our exact match on the same answers
    judges: dict[str, str]  # per kind, who said what is right
    figures: dict[str, float]  # other measures by the kit's own names
    disagreements: list[Verdict]
    other_answers: list[str]  # samples whose answer is not the one that the stage `evaluate` got
    empty: list[str]  # samples that the model said nothing to
    overlong: list[str]  # samples whose answer was too long to be one
    failed: dict[str, str]  # samples that the server would not answer, and what it said
    not_asked: list[str]  # samples that this kit cannot put
    seconds: float  # starting the model and the kit included
    fingerprint: Fingerprint | None  # as in Scores


def shares(predicted: Sequence[Prediction], right: Sequence[bool]) -> dict[str, float]:
    """Share of `right` per kind, in alphabetical order."""
    marks: dict[str, list[bool]] = defaultdict(list)
    for prediction, mark in zip(predicted, right, strict=True):
        marks[prediction.kind].append(mark)
    return {kind: sum(found) / len(found) for kind, found in sorted(marks.items())}


def disagreements(predicted: Sequence[Prediction], kit: Sequence[bool]) -> list[Verdict]:
    return [
        Verdict(id=p.id, kind=p.kind, reference=p.reference, answer=p.answer[:200], kit=said, ours=p.correct)
        for p, said in zip(predicted, kit, strict=True)
        if said != p.correct
    ]


def empty(predicted: Sequence[Prediction]) -> list[str]:
    return [p.id for p in predicted if not normalise(p.answer)]


def other_answers(predicted: Sequence[Prediction], own: Sequence[Prediction]) -> list[str]:
    """Samples whose answer here is not the one there, among those that are in both."""
    there = {p.id: p.answer for p in own}
    return [p.id for p in predicted if p.id in there and p.answer != there[p.id]]
