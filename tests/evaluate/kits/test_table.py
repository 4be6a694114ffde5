"""`alignti evaluate`: what it does not know, and what it says of models that are no longer there."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.errors import DataError, InputError, ModelError
from components.evaluate.kits import table
from components.evaluate.kits.command import evaluate
from components.evaluate.kits.table import Table
from components.records.paths import REPORTS, STUDENTS


def test_what_is_not_there_is_named_before_anything_runs(workplace: Path) -> None:
    with pytest.raises(DataError, match=r"scores.json is missing; `dvc repro`"):
        evaluate(["own"], ["sft"], [])
    (STUDENTS / "kd/model").rename("elsewhere")
    with pytest.raises(ModelError, match="no such folder"):
        evaluate(["lm-eval"], ["kd"], [])
    with pytest.raises(InputError, match="there is no student 'x'; there are"):
        evaluate(["lm-eval"], ["before-x"], [])
    with pytest.raises(InputError, match="--blank goes with --kit vlmeval and --task"):
        evaluate(["lm-eval"], ["sft"], ["arc_easy"], blank=True)
    assert not REPORTS.exists()


def test_figures_of_tasks_go_with_the_model_that_they_are_of(tmp_path: Path) -> None:
    results = table.with_tasks(Table(scores=[], tasks={}), "vlmeval", "sft", "a" * 64, {"MMStar/none/Overall": 0.25})
    results = table.with_tasks(results, "vlmeval", "sft", "a" * 64, {"POPE/Overall/Overall": 80})
    table.write(results, tmp_path)
    assert "| vlmeval/sft | MMStar/none/Overall | 0.25 |" in (tmp_path / "kits.md").read_text()
    assert table.read(lambda arm: {"sft": "a" * 64}[arm], tmp_path) == results
    assert results.tasks["vlmeval/sft"].figures == {"MMStar/none/Overall": 0.25, "POPE/Overall/Overall": 80}
    assert table.read(lambda arm: "b" * 64, tmp_path).tasks == {}  # trained again
