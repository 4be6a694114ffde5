"""Store of the teacher's answers: JSON lines, and a manifest that identifies teacher, data and settings."""

from __future__ import annotations

import hashlib
import statistics
from pathlib import Path
from typing import Literal

from components.config.settings import Settings
from components.errors import DataError
from components.io import sha256
from components.models.template import Template
from components.records.dataset import Manifest
from components.records.models import ModelIndex
from components.records.paths import DATASET, MODELS, ROWS, TEACHER
from components.records.teacher import TeacherChoice
from components.records.teacher_answers import Answered, AnswerFacts, AnswerManifest, AnswerSet

AGAIN = "`dvc repro write_answers` makes them anew"


def facts(settings: Settings) -> AnswerFacts:
    """Identity of the answers: the settings and outputs of earlier stages that determine them."""
    options, students = settings.distill.teacher_answers, ModelIndex.read(MODELS / "index.json").students
    assert options is not None
    return AnswerFacts(
        teacher=TeacherChoice.read(TEACHER / "choice.json").sha256,
        students={name: student.sha256 for name, student in sorted(students.items())},
        max_length=settings.models.max_length,
        dataset=Manifest.read(DATASET / "manifest.json").digest,
        rows=sha256([ROWS / "train.npy"]),
        template=hashlib.sha256(Template.from_settings(settings.models.template).identity.encode()).hexdigest(),
        precision=settings.distill.precision,
        asked=options.model_dump(),
    )


class Answers:
    """Reader of the teacher's answers to the train split.

    `answer_filter`: right, answers equal to the data's but for case and white space; likely, answers whose log-probability per
    token reaches the median. A conversation ends before the first answer that is filtered out.

    Raises DataError if there are none, if teacher, data set or settings differ, or if a file's hash differs.
    """

    def __init__(self, folder: Path, expected: AnswerFacts, answer_filter: Literal["right", "likely"] | None = None) -> None:
        answer_set = AnswerManifest.read(folder / "manifest.json").written
        if answer_set is None:
            raise DataError(f"{folder} holds no answers: teacher_answers was null in params/distill.yaml; {AGAIN}")
        for name, value in expected:
            if getattr(answer_set.facts, name) != value:
                raise DataError(f"{folder}: {name} is {getattr(answer_set.facts, name)} there, {value} here; {AGAIN}")
        self.manifest: AnswerSet = answer_set
        self._conversations: dict[int, list[list[list[int]]]] = {}
        records = list[Answered]()
        for name, digest in answer_set.files.items():
            if not (folder / name).is_file() or sha256([folder / name]) != digest:
                raise DataError(f"{folder / name} is missing or has other bytes than the manifest says; {AGAIN}")
            records += Answered.read_lines(folder / name)
        self._filter = answer_filter
        values = [value for record in records for conversation in _per_token(record) for value in conversation]
        median = statistics.median(values) if values else 0.0
        for record in records:
            likely = [[value >= median for value in conversation] for conversation in _per_token(record)]
            everything = [[True] * len(answers) for answers in record.answers]
            accepted = {"right": record.right, "likely": likely, None: everything}[answer_filter]
            prefixes = [
                answers[: [*flags, False].index(False)] for answers, flags in zip(record.answers, accepted, strict=True)
            ]
            if any(prefixes):
                self._conversations[record.sample] = [answers for answers in prefixes if answers]

    def answered(self, samples: list[int]) -> list[int]:
        """Subset of `samples` with an answer. Raises DataError if it is empty."""
        with_answers = [sample for sample in samples if sample in self._conversations]
        if not with_answers:
            which = {"right": "is right and has", "likely": "is among the likeliest and has", None: "has"}[self._filter]
            raise DataError(
                f"none of the teacher's {self.manifest.answers:,} answers {which} an end; raise teacher_answers.max_new_tokens"
                " in params/distill.yaml, or let a teacher that has learnt to answer write them"
            )
        return with_answers

    def conversation(self, sample: int, epoch: int) -> list[list[int]]:
        """Tokens of the answers of the epoch's conversation; epochs cycle through the sample's conversations."""
        answers = self._conversations[sample]
        return answers[epoch % len(answers)]


def _per_token(record: Answered) -> list[list[float]]:
    """Log-probability per token of each answer."""
    return [
        [total / len(tokens) for tokens, total in zip(answers, totals, strict=True)]
        for answers, totals in zip(record.answers, record.log_probs, strict=True)
    ]
