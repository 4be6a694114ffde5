"""Records of stage `select_teacher`."""

from __future__ import annotations

from components.records.record import Absent, Record

NO_TEACHER = Absent(none="params/distill.yaml:stage is align, which has no teacher")


class Candidate(Record):
    name: str
    exact_match: float
    per_kind: dict[str, float]
    nats_per_token: float  # mean cross-entropy of the reference answers
    irs: float | None  # IRS of its best layer; None: too few instructions per image, and no arm needs it
    irs_layer: int | None
    parameters: int
    seconds_per_1000: float
    memory_mib: float
    refused: list[str]  # violated limits of params/teacher.yaml


class TeacherChoice(Record):
    """artifacts/teacher/choice.json. Deterministic, as later stages depend on it."""

    name: str
    path: str
    sha256: str


class TeacherReport(Record):
    """reports/teacher/candidates.json"""

    chosen: str
    reason: str
    candidates: list[Candidate]
