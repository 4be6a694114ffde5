"""The walk over DVC's graph with several workers."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from components.config.load import load_settings
from components.config.runtime import RuntimeSettings
from components.errors import InputError
from flows import devices, dvc, dvc_repro, stage_output
from flows.parallel import main, repro, workers
from tests.flows.conftest import ran


def test_stages_run_in_dvcs_order_and_leave_dvc_nothing_to_do(project: Path) -> None:
    assert repro(2, dvc_repro.reproduce) == {"first": "ran", "cell@a": "ran", "cell@b": "ran", "last": "ran"}
    first, *cells, last = ran(project)
    assert (first, sorted(cells), last) == ("first", ["cell-a", "cell-b"], "last")
    assert dvc_repro.reproduce_all() == "unchanged" and dvc.status() == {}


@pytest.mark.parametrize("left", ['{"raw.txt": {"re', ""])
def test_a_list_of_locks_that_was_cut_off_stops_nothing(left: str, project: Path) -> None:
    """By a full disk, or by a kill between emptying and writing it."""
    (project / ".dvc/tmp").mkdir()
    (project / ".dvc/tmp/rwlock").write_text(left)
    assert dvc_repro.reproduce("first") == "ran"
    (project / ".dvc/tmp/rwlock").write_text(left)
    assert repro(2, dvc_repro.reproduce)["last"] == "ran"


def test_a_number_of_jobs_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["parallel", "--jobs", "-1"])
    with pytest.raises(InputError, match="1 or more"):
        main()


def test_only_what_is_stale_or_needs_what_was_run_is_started(project: Path) -> None:
    dvc_repro.reproduce_all()
    ran(project)
    assert set(repro(2, _never).values()) == {"unchanged"}
    (project / "a.txt").write_text("other")
    assert repro(2, dvc_repro.reproduce) == {"first": "unchanged", "cell@a": "ran", "cell@b": "unchanged", "last": "unchanged"}
    assert ran(project) == ["cell-a"], "what the cell writes is what it wrote before, so `last` has nothing new"
    (project / "raw.txt").write_text("other")
    assert repro(2, dvc_repro.reproduce)["first"] == "ran"


@pytest.mark.parametrize(("jobs", "at_once"), [(1, 1), (2, 2), (5, 2)])
def test_as_many_run_at_a_time_as_there_are_workers(project: Path, jobs: int, at_once: int) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def run(stage: str) -> dvc_repro.Outcome:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.2)
        with lock:
            running -= 1
        return "ran"

    assert set(repro(jobs, run)) == set(dvc.graph())
    assert most == at_once


def test_after_a_failure_nothing_is_begun_and_what_runs_is_ended_well(project: Path) -> None:
    (project / "fail-cell-a").write_text("2")
    with pytest.raises(dvc_repro.StageFailed, match="stage cell@a failed with exit code 2"):
        repro(2, dvc_repro.reproduce)
    assert sorted(ran(project)) == ["cell-a", "cell-b", "first"]
    assert repro(2, dvc_repro.reproduce) == {"first": "unchanged", "cell@a": "ran", "cell@b": "unchanged", "last": "ran"}


@pytest.mark.parametrize(("seconds", "states"), [(1000, ["100%"]), (-1, ["1%", "50%", "100%"])])
def test_lines_of_a_stage_open_with_its_label_and_its_bar_is_thinned_out(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seconds: float, states: list[str]
) -> None:
    monkeypatch.setattr(stage_output, "BAR_S", seconds)
    (project / "stage.py").write_text("print('1%\\r50%\\r100%')\n" + (project / "stage.py").read_text())
    dvc_repro.reproduce("first", on_line=stage_output.Labelled("first", verbose=True))
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("first: ") for line in lines)
    assert [line.removeprefix("first: ") for line in lines if line.endswith("%")] == states


def test_a_stage_is_one_line_and_its_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    say = stage_output.Labelled("first", verbose=False)
    for line in ("Running stage 'first':", " 10%|", "tracking: MLflow is away", "first: 3 rows", "git add dvc.lock"):
        say(line + "\n")
    say.close()
    assert capsys.readouterr().out == "first: tracking: MLflow is away\nfirst: 3 rows\n"


@pytest.mark.parametrize(
    ("gpus", "settings", "jobs"),
    [
        ("", {"threads": 1}, 8),
        ("", {"threads": 3}, 2),
        ("", {"threads": 16}, 1),
        ("0,1", {"threads": 1}, 2),
        ("0,1", {"threads": 1, "device": "cpu"}, 8),
        ("0,1", {"devices": 2}, 1),
    ],
)
def test_workers_are_gpus_or_else_cores(
    gpus: str, settings: dict[str, object], jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(devices.VISIBLE, gpus)
    monkeypatch.setattr("flows.parallel.cores", lambda: 8)
    runtime: RuntimeSettings = load_settings(Path(__file__).parents[2]).runtime
    assert workers(runtime.model_copy(update={"device": "auto", **settings})) == jobs


def _never(stage: str) -> dvc_repro.Outcome:
    raise AssertionError(f"{stage} is up to date")
