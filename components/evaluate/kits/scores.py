"""Scores of one kit for one model, beside our own metrics on the same answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import Field

from components.records.evaluate import Fingerprint
from components.records.record import Record


@dataclass(frozen=True)
class Measured:
    """Results of a kit on the split: per row the answer and, where the kit has a judge for it, its verdict."""

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
    judges: dict[str, str]  # per kind, who said what is right
    figures: dict[str, float]  # other measures by the kit's own names
    disagreements: list[Verdict] = Field(default_factory=list)
    other_answers: list[str] = Field(default_factory=list)  # samples whose answer is not the one that the stage `evaluate` got
    empty: list[str] = Field(default_factory=list)  # samples that the model said nothing to
    overlong: list[str] = Field(default_factory=list)  # samples whose answer was too long to be one
    failed: dict[str, str] = Field(default_factory=dict)  # samples that the server would not answer, and what it said
    not_asked: list[str] = Field(default_factory=list)  # samples that this kit cannot put
    seconds: float = 0  # starting the model and the kit included
    fingerprint: Fingerprint | None  # as in Scores
