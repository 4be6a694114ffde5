"""Paths of the stages' results, relative to the repository root, which is every stage's working directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

RAW = Path("data")
DATASET = Path("artifacts/dataset")
MODELS = Path("artifacts/models")
ROWS = Path("artifacts/rows")
TEACHER = Path("artifacts/teacher")
IRS = Path("artifacts/irs")
SIGNALS = Path("artifacts/signals")
ANSWERS = Path("artifacts/answers")
TERMS = Path("artifacts/terms")
STUDENTS = Path("artifacts/students")
SCORES = Path("artifacts/scores")
REPORTS = Path("reports")
RUNS = Path(".runs")  # checkpoints, journals, run records: neither git's nor DVC's
WORKSPACES = RUNS / "workspaces"  # worktrees of flow runs, whose `.runs` is a link to this one (flows/workspace.py)
DUMPS = RUNS / "dumps"  # dumps of steps with a non-finite loss
TEACHER_ARM = "teacher"  # name of the teacher's scores beside the arms'
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
