from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.config import recipes
from components.config.load import load_settings
from components.tracking import history
from flows import dvc_repro
from flows.plan import plan, reasons_to_run
from tests.flows.conftest import ran

GRAPH = {
    "prepare": [],
    "models": ["prepare"],
    "distill@a": ["models"],
    "distill@b": ["models"],
    "compare": ["distill@a", "distill@b"],
}


def test_nothing_changed_nothing_runs() -> None:
    assert not any(reasons_to_run(GRAPH, {}).values())


def test_a_change_runs_its_stage_and_all_that_follow_and_says_why() -> None:
    status = {"distill@a": [{"changed deps": {"params/study.yaml": {"arms.a": "modified"}, "components/x.py": "modified"}}]}
    assert reasons_to_run(GRAPH, status) == {
        "prepare": [],
        "models": [],
        "distill@a": ["params/study.yaml:arms.a modified", "components/x.py modified"],
        "distill@b": [],
        "compare": ["after distill@a"],
    }


def test_a_stage_that_never_ran_says_only_that() -> None:
    status = {
        "prepare": [{"changed deps": {"params/data.yaml": "new", "data": "deleted"}}, {"changed outs": {"out": "deleted"}}]
    }
    status["distill@a"] = status["prepare"]
    reasons = reasons_to_run(GRAPH, status)
    assert reasons["prepare"] == reasons["distill@a"] == ["has not run yet"]


def test_a_changed_command_is_a_reason() -> None:
    assert reasons_to_run(GRAPH, {"prepare": ["changed command"]})["prepare"] == ["changed command"]


def test_plan_agrees_with_what_dvc_then_runs(project: Path) -> None:
    dvc_repro.reproduce_all()
    (project / "a.txt").write_text("changed")
    expected = [step.stage for step in plan(load_settings())[0] if step.reasons]
    ran(project)
    dvc_repro.reproduce_all()
    assert expected == ["cell@a", "last"]
    assert [line.split()[0] for line in (project / "ran.log").read_text().splitlines()] == [
        "cell-a"
    ]  # same bytes: last is spared


@pytest.mark.parametrize(("recorded_of", "seconds"), [("digits", 7.5), ("smoke", None)])
def test_times_come_from_the_last_run_of_this_recipe_else_from_what_it_says(
    project: Path, recorded_of: str, seconds: float | None
) -> None:
    history.LAST.mkdir(parents=True)
    (history.LAST / "prepare.json").write_text(json.dumps({"run": "prepare-1", "seconds": 7.5, "recipe": recorded_of}))
    (project / "dvc.yaml").write_text("stages: {prepare: {cmd: 'true', outs: [x]}}")
    (step,), basis, recipe = plan(load_settings())
    assert step.seconds == (seconds or recipes.about("digits").seconds["prepare"])
    assert recipe == "digits" and "params/ is digits" in basis
