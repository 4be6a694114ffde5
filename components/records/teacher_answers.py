"""Records of stage `write_answers`."""

from __future__ import annotations

from typing import Any

from components.records.record import Record


class AnswerFacts(Record):
    """Identity of the teacher's answers: they serve a run only if each of these is the same for both."""

    teacher: str  # sha256 of its folder
    dataset: str  # digest
    rows: str  # sha256 of what `check_rows` left of the train split
    template: str  # sha256
    precision: str
    asked: dict[str, Any]  # `teacher_answers` of params/distill.yaml


class AnswerSet(Record):
    facts: AnswerFacts
    samples: int
    answers: int  # all that were written
    cut_off: int  # of them, without an end of turn: not kept
    without: int  # samples none of whose answers is kept: nothing trains on them
    tokens: float  # mean length of those kept
    log_prob: float  # mean log-probability per token of those kept, nats
    files: dict[str, str]  # file -> sha256


class AnswerManifest(Record):
    """artifacts/answers/manifest.json; `written` is null where params/distill.yaml asks for none."""

    written: AnswerSet | None


class Answered(Record):
    """One line of a file: the kept answers to the first question of a sample, in the order in which they were drawn."""

    sample: int  # its index in the train split
    id: str
    answers: list[list[int]]  # tokens, the end of turn included
    log_probs: list[float]  # of each answer under the teacher, all tokens
    cut_off: int  # answers without an end of turn
    texts: list[str]
