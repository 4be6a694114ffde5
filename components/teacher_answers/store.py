"""Store of the teacher's answers: JSON lines, and a manifest that identifies teacher, data and settings."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from components.config.settings import Settings
from components.dataset.shards import Samples
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

    def __init__(
        self, folder: Path, wanted: AnswerFacts, samples: Samples, keep: Literal["right", "likely"] | None = None
    ) -> None:
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
            lines += map(Answered.model_validate_json, (folder / name).read_text(encoding="utf-8").splitlines())
        passes = _filter(lines, samples, keep)
        for line in lines:
            for index, answers in enumerate(line.answers):
                turns = [passes(line, index, turn) for turn in range(len(answers))]
                if whole := answers[: [*turns, False].index(False)]:
                    self._of.setdefault(line.sample, []).append(whole)

    def answered(self, samples: list[int]) -> list[int]:
        """Subset of `samples` with an answer. Raises DataError if it is empty."""
        found = [sample for sample in samples if sample in self._of]
        if not found:
            raise DataError(
                f"none of the teacher's {self.manifest.answers:,} answers has an end and passes the arm's answer_filter; raise"
                " teacher_answers.max_new_tokens in params/distill.yaml, or let a teacher that has learnt to answer write them"
            )
        return found

    def of(self, sample: int, epoch: int) -> list[list[int]]:
        """Tokens of the answers of the epoch's conversation; epochs cycle through the sample's conversations."""
        answers = self._of[sample]
        return answers[epoch % len(answers)]


def _filter(lines: Sequence[Answered], samples: Samples, keep: str | None) -> Callable[[Answered, int, int], bool]:
    """Whether an answer is kept, by its line, conversation and turn."""

    def per_token(line: Answered, conversation: int, turn: int) -> float:
        return line.log_probs[conversation][turn] / len(line.answers[conversation][turn])

    def is_right(line: Answered, conversation: int, turn: int) -> bool:
        return _folded(line.texts[conversation][turn]) == _folded(samples[line.sample].turns[turn].answer)

    if keep == "right":
        return is_right
    if keep is None:
        return lambda *_: True
    each = [
        per_token(line, n, turn) for line in lines for n, answers in enumerate(line.answers) for turn in range(len(answers))
    ]
    median = statistics.median(each) if each else 0.0
    return lambda *answer: per_token(*answer) >= median


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
