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
from components.records.paths import DATASET, ROWS, TEACHER
from components.records.teacher import TeacherChoice
from components.records.teacher_answers import Answered, AnswerFacts, AnswerManifest, AnswerSet

AGAIN = "`dvc repro write_answers` makes them anew"


def facts(settings: Settings) -> AnswerFacts:
    """Identity of the answers: the settings and outputs of earlier stages that determine them."""
    asked = settings.distill.teacher_answers
    assert asked is not None
    return AnswerFacts(
        teacher=TeacherChoice.read(TEACHER / "choice.json").sha256,
        dataset=Manifest.read(DATASET / "manifest.json").digest,
        rows=sha256([ROWS / "train.npy"]),
        template=hashlib.sha256(Template.asked(settings.models.template).identity.encode()).hexdigest(),
        precision=settings.distill.precision,
        asked=asked.model_dump(),
    )


class Answers:
    """Reader of the teacher's answers to the train split.

    `keep`: right, answers equal to the data's but for case and white space; likely, answers whose log-probability per token
    reaches the median. A conversation ends before the first answer that is not kept.

    Raises DataError if there are none, if teacher, data set or settings differ, or if a file's hash differs.
    """

    def __init__(self, folder: Path, wanted: AnswerFacts, keep: Literal["right", "likely"] | None = None) -> None:
        written = AnswerManifest.read(folder / "manifest.json").written
        if written is None:
            raise DataError(f"{folder} holds no answers: teacher_answers was null in params/distill.yaml; {AGAIN}")
        for name, value in wanted:
            if getattr(written.facts, name) != value:
                raise DataError(f"{folder}: {name} is {getattr(written.facts, name)} there, {value} here; {AGAIN}")
        self.manifest: AnswerSet = written
        self._of: dict[int, list[list[list[int]]]] = {}
        lines = list[Answered]()
        for name, digest in written.files.items():
            if not (folder / name).is_file() or sha256([folder / name]) != digest:
                raise DataError(f"{folder / name} is missing or has other bytes than the manifest says; {AGAIN}")
            lines += Answered.read_lines(folder / name)
        self._keep = keep
        every = [each for line in lines for conversation in _per_token(line) for each in conversation]
        median = statistics.median(every) if every else 0.0
        for line in lines:
            likely = [[each >= median for each in conversation] for conversation in _per_token(line)]
            passes = {"right": line.right, "likely": likely, None: [[True] * len(answers) for answers in line.answers]}[keep]
            kept = [answers[: [*of, False].index(False)] for answers, of in zip(line.answers, passes, strict=True)]
            if any(kept):
                self._of[line.sample] = [answers for answers in kept if answers]

    def answered(self, samples: list[int]) -> list[int]:
        """Subset of `samples` with an answer. Raises DataError if it is empty."""
        found = [sample for sample in samples if sample in self._of]
        if not found:
            which = {"right": "is right and has", "likely": "is among the likeliest and has", None: "has"}[self._keep]
            raise DataError(
                f"none of the teacher's {self.manifest.answers:,} answers {which} an end; raise teacher_answers.max_new_tokens"
                " in params/distill.yaml, or let a teacher that has learnt to answer write them"
            )
        return found

    def of(self, sample: int, epoch: int) -> list[list[int]]:
        """Tokens of the answers of the epoch's conversation; epochs cycle through the sample's conversations."""
        answers = self._of[sample]
        return answers[epoch % len(answers)]


def _per_token(line: Answered) -> list[list[float]]:
    """Log-probability per token of each answer."""
    return [
        [total / len(tokens) for tokens, total in zip(answers, totals, strict=True)]
        for answers, totals in zip(line.answers, line.log_probs, strict=True)
    ]
