"""Records of stage `write_answers`."""

from __future__ import annotations

from typing import Any

from components.records.record import Record


class AnswerFacts(Record):
    """Identity of the teacher's answers: a run uses them only if all fields are equal."""

    teacher: str  # sha256 of its folder
    students: dict[str, str]  # student -> sha256 of its folder; the answers fit the `max_length` and vocabulary of all
    max_length: int
    dataset: str  # digest
    rows: str  # sha256 of the train split's rows after `check_rows`
    template: str  # sha256
    precision: str
    asked: dict[str, Any]  # `teacher_answers` of params/distill.yaml


class AnswerSet(Record):
    facts: AnswerFacts
    samples: int
    answers: int  # all generated answers
    cut_off: int  # answers without an end of turn, which are not kept
    without: int  # samples without a kept answer, which are not trained on
    tokens: float  # mean length of the kept answers
    log_prob: float  # mean log-probability per token of the kept answers, nats
    files: dict[str, str]  # file -> sha256


class AnswerManifest(Record):
    """artifacts/answers/manifest.json; `written` is null if params/distill.yaml disables the answers."""

    written: AnswerSet | None


class Answered(Record):
    """One line of a file: a sample's conversations in sampling order, each of the kept answers to its first questions."""

    sample: int  # index in the train split
    id: str
    answers: list[list[list[int]]]  # token ids, the end of turn included
    log_probs: list[list[float]]  # teacher's log-probability of each answer, summed over tokens
    cut_off: int  # answers without an end of turn
    texts: list[list[str]]
    right: list[list[bool]]  # equal to the data's answer but for case and white space
