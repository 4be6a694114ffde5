"""Metrics and plots for DVC's own commands: reports/metrics.json, scores.csv and losses.csv.

`dvc metrics diff` and `dvc exp show` print a column per number, so metrics.json holds few: exact match of teacher and arms, and
each arm's gain over each baseline. `dvc plots diff` draws the two tables.
"""

from __future__ import annotations

import json
from pathlib import Path

from components.evaluate.load_results import Losses
from components.io import write_table, write_text
from components.records.compare import Comparison
from components.records.paths import REPORTS

METRICS, SCORES_TABLE, LOSSES_TABLE = (REPORTS / name for name in ("metrics.json", "scores.csv", "losses.csv"))
NOT_LOSSES = ("step", "lr", "grad_norm")


def write(comparison: Comparison | None, losses: Losses) -> list[Path]:
    """Write all three files, without rows for a run without a teacher (None); returns their paths."""
    results = comparison.results if comparison else {}
    shares = {arm: (result.exact_match, *result.ci95) for arm, result in results.items()}
    scores = [
        {"arm": arm, "exact_match": round(share, 5), "low": round(low, 5), "high": round(high, 5)}
        for arm, (share, low, high) in shares.items()
    ]
    steps = [
        {"arm": arm, "step": int(row["step"]), "term": term, "loss": value}
        for arm, rows in losses.items()
        for row in rows
        for term, value in row.items()
        if term not in NOT_LOSSES and value  # a term that an arm does not train is logged as 0
    ]
    write_text(METRICS, json.dumps(metrics(comparison) if comparison else {}, indent=2) + "\n")
    write_table(SCORES_TABLE, scores, ("arm", "exact_match", "low", "high"))
    write_table(LOSSES_TABLE, steps, ("arm", "step", "term", "loss"))
    return [METRICS, SCORES_TABLE, LOSSES_TABLE]


def metrics(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Exact match (0..1) of the teacher and of each arm, with the arm's gain over each baseline."""
    figures = {name: {"exact_match": round(result.exact_match, 5)} for name, result in comparison.results.items()}
    for arm, result in comparison.arms.items():
        figures[arm] |= {f"gain_over_{base}": round(gain.difference, 5) for base, gain in result.gains.items()}
    return figures
