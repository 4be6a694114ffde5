"""What TensorBoard and W&B get of a run's journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.records.paths import RUNS, WORKSPACES
from components.tracking import also
from components.tracking.stage_run import stage_run
from tests.tracking.test_tracking import journals, runtime, work


class Noted:
    """A tracker that records its calls."""

    lines: list[str] = []  # noqa: RUF012

    def __init__(self, start: also.Line, run: str) -> None:
        self.lines.append(start["name"])

    def log(self, line: also.Line) -> None:
        self.lines.append(line["event"])

    def close(self) -> None:
        self.lines.append("closed")


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("components.config.recipes.nearest", lambda: ("digits", 0))
    monkeypatch.setattr("components.tracking.stage_run.PATIENCE_S", 120)
    monkeypatch.setitem(also.TRACKERS, "noted", Noted)
    Noted.lines.clear()


def test_a_journal_is_handed_on_once_whatever_interrupts_it() -> None:
    work()
    (journal,) = journals()
    complete = journal.read_bytes()
    journal.write_bytes(complete[: complete.index(b"\n") + 20])  # half a line
    assert [line["event"] for line in also._unsent_lines(journal, journal.with_suffix(".noted"))] == ["start"]
    journal.write_bytes(complete)
    also.follow("noted", journal)
    assert Noted.lines[:2] == ["distill/align_ti", "params"] and Noted.lines[-2:] == ["end", "closed"]
    assert also._unsent_lines(journal, journal.with_suffix(".noted")) == []


def test_curves_outlive_the_workspace_of_a_flow_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert also._home() / also.EVENTS == tmp_path / ".tensorboard"
    workspace = tmp_path / WORKSPACES / "pipeline-0a0a0a0a"
    workspace.mkdir(parents=True)
    (workspace / RUNS).symlink_to(tmp_path / RUNS)
    copy_of_dvc = tmp_path / ".dvc/tmp/exps/standalone/tmp1a2b"
    copy_of_dvc.mkdir(parents=True)
    for folder in (workspace, copy_of_dvc):
        monkeypatch.chdir(folder)
        assert also._home() / also.EVENTS == tmp_path / ".tensorboard"


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_costs_a_line_and_one_that_is_gets_the_curves(
    tracker: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with stage_run("distill", cell="kd", runtime=runtime().model_copy(update={"trackers": [tracker]})) as run:
        run.metrics({"loss/kd": 2.0}, step=1)
    try:
        __import__(tracker)
    except ImportError:
        assert f"tracking: {tracker} does not take this run (ModuleNotFoundError" in capfd.readouterr().err
    else:
        folder, files = {"tensorboard": (".tensorboard", "*tfevents*"), "wandb": ("wandb", "*.wandb")}[tracker]
        assert list(Path(folder).rglob(files))
