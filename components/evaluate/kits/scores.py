"""Scores of one kit for one model, beside our own metrics on the same answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import Field

from components.records.evaluate import Fingerprint
from components.records.record import Record


@dataclass(frozen=True)
class KitResult:
    """Results of a kit on the split: the answer per row and, where the kit has a judge for it, the verdict."""

    answers: dict[int, str]
    verdicts: dict[int, bool]
    figures: dict[str, float]  # other measures
    failed: dict[int, str] = field(default_factory=dict)  # row -> error of the server
    overlong: list[int] = field(default_factory=list)


class Verdict(Record):
    """Answer on which the kit's judge and ours disagree."""

    id: str
    kind: str
    reference: str
    answer: str  # first 200 characters
    kit: bool
    ours: bool


class KitScores(Record):
    """Scores of one model by one kit. Missing answers count as wrong in every share."""

    arm: str
    kit: str  # "own", "vlmeval", "lm-eval"
    model: str  # sha256 over its folder
    samples: int
    exact_match: float  # accuracy, by the kit's judge where it has one for the kind
    per_kind: dict[str, float]
    judges: dict[str, str]  # kind -> judge
    figures: dict[str, float]  # other measures, by the kit's names
    disagreements: list[Verdict] = Field(default_factory=list)
    other_answers: list[str] = Field(default_factory=list)  # samples whose answer differs from that of the stage `evaluate`
    empty: list[str] = Field(default_factory=list)  # samples with an empty answer
    overlong: list[str] = Field(default_factory=list)  # samples with an answer longer than LONGEST (vlmeval_worker.py)
    failed: dict[str, str] = Field(default_factory=dict)  # sample -> error of the server
    not_asked: list[str] = Field(default_factory=list)  # samples that this kit cannot present, such as those without an image
    seconds: float = 0  # wall time, start of model and kit included
    fingerprint: Fingerprint | None  # as in Scores
