"""A study from end to end, with Prefect, DVC and git as they are, and stages that take no time."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Crashed, Failed

from components.errors import AlignTIError, Interrupted
from flows import dvc_repro, workspace
from flows import study as module
from flows.early_stopping import diverged
from flows.remote_arms import NotMade
from flows.study import Budget, BudgetSpent, study
from tests.flows.conftest import git, ran

PIPELINE = """
vars:
  - params/study.yaml:arms
stages:
  first:
    cmd: python stage.py first
    deps: [stage.py]
    outs: [artifacts/first]
  distill:
    foreach: ${arms}
    do:
      cmd: python stage.py distill ${key}
      deps: [artifacts/first]
      params:
        - params/study.yaml:
            - arms.${key}
      outs: ["artifacts/students/${key}"]
  evaluate:
    foreach: ${arms}
    do:
      cmd: python stage.py evaluate ${key}
      deps: ["artifacts/students/${key}"]
      outs: ["artifacts/scores/${key}"]
  compare:
    cmd: python stage.py compare
    deps: [artifacts/scores]
    outs: [reports/compare.md]
"""

STAGE = """
import json, sys
from pathlib import Path
stage, *arm = sys.argv[1:]
name = "-".join([stage, *arm])
main = Path(".runs").resolve().parent  # what the test looks at, wherever this workspace is
with (main / "ran.log").open("a") as log:
    log.write(name + "\\n")
if (main / f"fail-{name}").exists():
    sys.exit(2)
def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
if stage == "first":
    write("artifacts/first", "1")
if stage == "distill":
    cost = {"train_seconds": 60.0, "peak_memory_mib": 10.0, "device": "cpu", "steps": 1}
    write(f"artifacts/students/{arm[0]}/cost.json", json.dumps(cost))
if stage == "evaluate":
    texts = ("kit", "kit_version", "dataset", "dataset_hash", "prompt_hash", "judge", "transformers", "dtype", "device")
    fingerprint = {**dict.fromkeys(texts, "stub"), "decoding": {}}
    scores = {"arm": arm[0], "samples": 2, "exact_match": 0.5, "per_kind": {"digit": 0.5}, "yes_no": {}, "token_f1": 0.5}
    scores |= {"token_f1_per_kind": {}, "fingerprint": fingerprint}
    write(f"artifacts/scores/{arm[0]}/scores.json", json.dumps(scores))
    write(f"artifacts/scores/{arm[0]}/predictions.jsonl", "")
if stage == "compare":
    write("reports/compare.md", "compared")
"""

STUDY: dict[str, Any] = {
    "about": "a test",
    "base": {"weights": {"sft": 1.0, "kd": 1.0, "iva": 0.0, "tpa": 0.0}, "student": "student"},
    "cells": {},
    "grid": {"weights.tpa": [0.0, 1.0], "seed": [1]},
    "baselines": ["tpa0"],
    "device_hours": None,
    "diverged_above": None,
}


def declare(**changes: Any) -> None:
    Path("params/studies/mine.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    git("add", "--all")
    git("commit", "--quiet", "-m", "study")


@pytest.fixture
def clone(project: Path, prefect_server: None) -> Path:
    commit(STAGE)
    return project


def commit(stage: str) -> None:
    """Make the current folder, a DVC project, a git repository with the study `mine`; every stage is `stage`."""
    Path("dvc.yaml").write_text(PIPELINE)
    Path("stage.py").write_text(stage)
    ignored = ("artifacts", "reports", ".runs", ".mlflow", ".servers", "ran.log", "fail-*")
    Path(".gitignore").write_text("\n".join([*ignored, ".dvc/tmp", ".dvc/cache", ".dvc/config.local"]))
    Path(".dvc/config").write_text("[core]\n    analytics = false\n")
    git("init", "--quiet")
    declare()


def records() -> dict[str, list[dict[str, Any]]]:
    journals = (path.read_text().splitlines() for path in Path(".runs/journal").glob("cell-*.jsonl"))
    events = [[json.loads(line) for line in lines] for lines in journals]
    return {lines[0]["name"]: lines for lines in events}


def test_a_failed_arm_leaves_the_rest_and_the_next_try_runs_only_what_is_missing(clone: Path) -> None:
    original = Path("params/study.yaml").read_bytes()
    (clone / "fail-distill-tpa0-seed1").touch()
    with pytest.raises(AlignTIError, match=r"1 of 2 arms of study mine are missing(.|\n)*tpa0-seed1: .*exit code 2"):
        study("mine")
    assert sorted(ran(clone)) == ["distill-tpa0-seed1", "distill-tpa1-seed1", "evaluate-tpa1-seed1", "first"]
    assert set(records()) == {"tpa1-seed1"}

    (clone / "fail-distill-tpa0-seed1").unlink()
    assert study("mine") == {"tpa0-seed1": "ran", "tpa1-seed1": "restored"}
    assert sorted(ran(clone)) == ["compare", "distill-tpa0-seed1", "evaluate-tpa0-seed1"]
    assert set(records()) == {"tpa0-seed1", "tpa1-seed1"}  # each once

    start, params, metrics, *_ = records()["tpa1-seed1"]
    assert {"study": "mine", "variant": "tpa1", "recipe": "digits"}.items() <= start["tags"].items()
    assert json.loads(start["tags"]["eval.fingerprint"])["kit"] == "stub"
    assert start["tags"]["dvc.md5"].endswith(".dir")
    assert params["values"] == {"weights.tpa": "1.0"}  # what the study varies, and no more
    assert metrics["values"]["exact_match"] == 0.5 and metrics["values"]["cost/device_hours"] == pytest.approx(1 / 60)

    assert Path.cwd() == clone and Path("params/study.yaml").read_bytes() == original
    assert not any((clone / ".runs/workspaces").iterdir())  # no worktree is left,
    branches = subprocess.run(["git", "branch", "--list", "runs/*"], capture_output=True, text=True).stdout.split()
    assert len(branches) == 2 and all(branch.startswith("runs/mine-") for branch in branches)  # but what came of it is,
    assert workspace.prune(days=1) == [] and workspace.prune(days=0) == branches  # until it is old


def test_the_arms_of_a_study_that_is_stopped_are_recorded(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for = module.wait_for

    def stopped(description: str, futures: dict[str, Any]) -> None:
        wait_for(description, futures)
        if description == "arms":
            raise Interrupted("stopped")

    monkeypatch.setattr(module, "wait_for", stopped)
    with pytest.raises(Interrupted):
        study("mine")
    assert set(records()) == {"tpa0-seed1", "tpa1-seed1"}


def test_no_arm_is_started_that_would_pass_the_budget() -> None:
    budget = Budget(hours=1.0, devices=1)
    budget.reserve("a")  # nothing is known of what an arm takes
    budget.spend("a", 1500)
    budget.reserve("b")
    budget.spend("b", 1500)
    with pytest.raises(BudgetSpent, match=r"c is not run: 0\.83 of 1 device hours are spent"):
        budget.reserve("c")
    Budget(hours=None, devices=1).reserve("c")


def test_an_arm_on_two_devices_spends_the_hours_of_both() -> None:
    budget = Budget(hours=1.0, devices=2)
    budget.spend("a", 1500)
    with pytest.raises(BudgetSpent, match=r"b is not run: 0\.83 of 1 device hours are spent"):
        budget.reserve("b")


def test_arms_that_run_count_as_what_the_others_took() -> None:
    budget = Budget(hours=1.0, devices=1)
    budget.reserve("a")
    budget.spend("a", 1500)
    budget.reserve("b")
    with pytest.raises(BudgetSpent):
        budget.reserve("c")


def test_with_a_cap_nothing_begins_beside_the_first_whose_cost_nobody_knows() -> None:
    budget, began = Budget(hours=1.0, devices=1), threading.Event()
    budget.reserve("a")

    def second() -> None:
        with pytest.raises(BudgetSpent):
            budget.reserve("b")
        began.set()

    waiting = threading.Thread(target=second)
    waiting.start()
    assert not began.wait(0.2)
    budget.spend("a", 3600)
    waiting.join(60)
    assert began.is_set()


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        *(([2.0, 1.0], False), ([2.0, 5.9], False), ([2.0, 6.1], True), ([2.0, float("nan")], True)),
        *(([0.0, 0.5], False), ([0.0, 0.5, 1.6], True)),
    ],
)
def test_a_training_whose_loss_explodes_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], stops: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    reason, of_another_arm = diverged("kd-seed1", 3.0), diverged("kd", 3.0)
    assert reason is not None and reason() is None
    journal = tmp_path / ".runs/journal/20260101T000000-distill@kd-seed1-0a0a0a0a.jsonl"
    journal.parent.mkdir(parents=True)
    lines = [{"event": "metrics", "step": step, "values": {"loss/total": loss}} for step, loss in enumerate(losses)]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "met')
    os.utime(journal, (0, 0))  # whatever the file's clock says
    assert (reason() is not None) == stops
    assert of_another_arm is not None and of_another_arm() is None
    again = diverged("kd-seed1", 3.0)
    assert again is not None and again() is None  # an earlier run's end is not the next one's
    other = diverged("kd-seed2", 3.0)
    assert other is not None and other() is None


def test_a_stopped_arm_says_why(project: Path) -> None:
    (project / "stage.py").write_text("import time; time.sleep(600)")
    with pytest.raises(dvc_repro.StageFailed, match="the loss exploded"):
        dvc_repro.reproduce("first", stop_when=lambda: "the loss exploded")
    assert module.DONE == ("unchanged", "restored", "ran")


@pytest.mark.parametrize(("state", "exit_code"), [(Crashed(message="its worker died"), 75), (Failed(message="exit code 2"), 2)])
def test_an_arm_whose_worker_died_is_handed_out_again_and_one_that_failed_is_not(state: State, exit_code: int) -> None:
    run = FlowRun(flow_id=uuid4(), name="mine-tpa0", state=state, total_run_time=timedelta(seconds=7))
    failure = NotMade(run)
    assert (failure.exit_code, failure.seconds) == (exit_code, 7.0)
    assert str(failure) == f"flow run mine-tpa0 is {state.name}: {state.message}"
