"""Metrics and plots for DVC's own commands: reports/metrics.json, scores.csv and losses.csv.

`dvc metrics diff` and `dvc exp show` print a column per number, so metrics.json holds few: exact match of teacher and arms, and
each arm's gain over each baseline. `dvc plots diff` draws the two tables.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from components.evaluate.load_results import Losses
from components.io import write_text
from components.records.compare import Comparison
from components.records.paths import REPORTS, TEACHER_ARM

METRICS, SCORES_TABLE, LOSSES_TABLE = (REPORTS / name for name in ("metrics.json", "scores.csv", "losses.csv"))
NOT_LOSSES = ("step", "lr", "grad_norm")


def write(comparison: Comparison, losses: Losses) -> list[Path]:
    """Write all three files; returns their paths."""
    everybody = [(TEACHER_ARM, comparison.teacher), *((arm, comparison.arms[arm]) for arm in comparison.order)]
    scores = [(arm, round(result.exact_match, 5), *(round(end, 5) for end in result.ci95)) for arm, result in everybody]
    steps = (
        (arm, int(row["step"]), term, value)
        for arm, rows in losses.items()
        for row in rows
        for term, value in row.items()
        if term not in NOT_LOSSES and value  # a term that an arm does not train is logged as 0
    )
    return _written(metrics(comparison), scores, steps)


def write_none() -> list[Path]:
    """Write the files without rows, for a run without a teacher."""
    return _written({}, (), ())


def metrics(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Exact match (0..1) of the teacher and of each arm, with the arm's gain over each baseline."""
    figures = {TEACHER_ARM: {"exact_match": round(comparison.teacher.exact_match, 5)}}
    for arm in comparison.order:
        result = comparison.arms[arm]
        gains = {f"gain_over_{base}": round(gain.difference, 5) for base, gain in result.gains.items()}
        figures[arm] = {"exact_match": round(result.exact_match, 5), **gains}
    return figures


def _written(figures: dict[str, Any], scores: Iterable[tuple[Any, ...]], losses: Iterable[tuple[Any, ...]]) -> list[Path]:
    write_text(METRICS, json.dumps(figures, indent=2) + "\n")
    _table(SCORES_TABLE, ("arm", "exact_match", "low", "high"), scores)
    _table(LOSSES_TABLE, ("arm", "step", "term", "loss"), losses)
    return [METRICS, SCORES_TABLE, LOSSES_TABLE]


def _table(path: Path, names: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    write_text(path, text.getvalue())
