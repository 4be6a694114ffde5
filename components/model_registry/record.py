"""Registration of trained students: one model version each, requested in the journal of the outcome's run.

While the server is unreachable the request waits in the journal, and `alignti sync` sends it later.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from components.config.settings import Settings
from components.errors import DataError
from components.model_registry import drift
from components.records.dataset import Manifest
from components.records.evaluate import Scores
from components.records.paths import DATASET, RAW, SCORES, STUDENTS
from components.tracking import history, journal, outcome, provenance
from components.tracking.stage_run import nearest_recipe


@dataclass(frozen=True)
class Student:
    """Arm whose weights and scores are in this workspace, with their MD5 in `dvc.lock`."""

    arm: str
    md5: str  # MD5 of STUDENTS/ARM
    scores_md5: str  # MD5 of SCORES/ARM
    scores: Scores


def scored_students(arms: Sequence[str]) -> list[Student]:
    """Students of these arms. Raises DataError if one is not trained and scored, or its scores changed since."""
    lock = provenance.locked()
    students = []
    for arm in arms:
        md5 = lock.get(f"distill@{arm}", {}).get(str(STUDENTS / arm))
        scores = lock.get(f"evaluate@{arm}", {}).get(str(SCORES / arm))
        if md5 is None or scores is None or provenance.digest(SCORES / arm).md5 != scores:
            raise DataError(
                f"{arm} has not been trained and scored here, or {SCORES / arm} was changed since; `dvc repro` does both"
            )
        students.append(Student(arm, md5, scores, Scores.read(SCORES / arm / "scores.json")))
    return students


def best(students: Sequence[Student]) -> Student:
    """Student of the highest exact match; ties go to the first, as in the report."""
    return max(students, key=lambda student: student.scores.exact_match)


def register(students: Sequence[Student], settings: Settings, candidate: Student | None = None) -> list[str]:
    """Journal every student not registered yet, `candidate` as the candidate; returns the newly journalled arms."""
    return [student.arm for student in students if _journal_version(student, settings, candidate=student is candidate)]


def _journal_version(student: Student, settings: Settings, candidate: bool) -> bool:
    arm, fingerprint = settings.arm(student.arm), student.scores.fingerprint
    training_journal = provenance.maker(student.md5) or ""
    training_tags = history.tags(training_journal)
    tags: dict[str, str] = {
        "arm": student.arm,
        **nearest_recipe().tag,
        "dvc.path": str(STUDENTS / student.arm),
        "dvc.md5": student.md5,
        "dvc.scores": student.scores_md5,
        **_data_tags(),
        "eval.fingerprint": "null" if fingerprint is None else fingerprint.model_dump_json(),
        "exact_match": f"{student.scores.exact_match:.6f}",
        "samples": str(student.scores.samples),
        **{key: training_tags[key] for key in ("mlflow.source.git.commit", "git.dirty") if key in training_tags},
    }
    return journal.register(
        outcome.of_arm(student.arm, student.md5, settings),
        made_by=training_journal,
        candidate=candidate,
        tags=tags,
        params={key: str(value) for key, value in journal.flatten(arm.model_dump(mode="json"))},
        description=f"{student.arm}: {student.scores.exact_match:.1%} exact match on {student.scores.samples:,} samples",
    )


def _data_tags() -> dict[str, str]:
    """Tags of the training data: MD5 of raw and prepared data, and statistics."""
    prepared = provenance.locked().get("prepare", {}).get(str(DATASET))
    digests = {"dvc.raw": provenance.raw().get(str(RAW)), "dvc.dataset": prepared}
    statistics = drift.statistics(Manifest.read(DATASET / "manifest.json"))
    return {key: md5 for key, md5 in digests.items() if md5} | {"data.statistics": json.dumps(statistics)}
