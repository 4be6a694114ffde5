from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml

from components.errors import InputError, TryAgainError
from flows import dvc, dvc_repro
from tests.flows.conftest import ROOT, ran
from tests.planted import CANARY, REMOTE


def test_graph_is_in_running_order_with_what_each_stage_needs(project: Path) -> None:
    graph = dvc.graph()
    assert graph == {"first": [], "cell@a": ["first"], "cell@b": ["first"], "last": ["cell@a", "cell@b"]}
    earlier: set[str] = set()
    for stage, needs in graph.items():
        assert set(needs) <= earlier
        earlier.add(stage)


def test_a_stage_runs_alone_and_only_when_its_inputs_are_new(project: Path) -> None:
    assert dvc_repro.reproduce("first") == "ran"
    assert dvc_repro.reproduce("first") == "unchanged"
    (project / "out/first").unlink()
    assert dvc_repro.reproduce("first") == "restored"
    assert ran(project) == ["first"]
    assert set(dvc.status()) == {"cell@a", "cell@b", "last"}


def test_what_is_restored_is_told_by_the_run_of_its_stage_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dvc_repro.reproduce("first")
    (project / "out/first").unlink()
    capsys.readouterr()
    assert dvc.restore("first") and (project / "out/first").exists()
    assert capsys.readouterr() == ("", "")


def test_a_failed_stage_raises_with_its_own_exit_code(project: Path) -> None:
    (project / "fail-first").write_text("75")
    with pytest.raises(dvc_repro.StageFailed, match="stage first failed") as failure:
        dvc_repro.reproduce("first")
    assert failure.value.exit_code == 75


@pytest.mark.parametrize(
    ("ending", "error", "exit_code"),
    [
        ("os.kill(os.getpid(), 9)", r"first was killed by signal 9 \(out of memory\?\); run again", 75),
        ("os.kill(os.getpid(), 11)", "first was killed by signal 11; run again", 75),
        ("sys.exit(137)", "first was killed by signal 9", 75),  # as components/distill/launch.py passes it on
        ("os.kill(os.getpid(), 15)", "first failed with exit code -15", 143),
        ("sys.exit(143)", "first failed with exit code 143", 143),
        ("sys.exit(130)", "first failed with exit code 130", 143),  # Ctrl-C
        ("sys.exit(255)", "first failed with exit code 255", 255),
    ],
)
def test_a_killed_stage_is_told_in_words_and_may_be_tried_again(project: Path, ending: str, error: str, exit_code: int) -> None:
    (project / "stage.py").write_text(f"import os, sys; {ending}")
    with pytest.raises(dvc_repro.StageFailed, match=f"^stage {error}") as failure:
        dvc_repro.reproduce("first")
    assert failure.value.exit_code == exit_code


def test_a_fault_of_dvc_itself_ends_with_a_code_of_ours(project: Path) -> None:
    (project / "out").write_text("a file, where the stage's output wants a folder")
    with pytest.raises(dvc_repro.StageFailed, match="stage first failed") as failure:
        dvc_repro.reproduce("first")
    assert failure.value.exit_code == 2
    warned = "tracking: [Errno 28] No space left on device\n"
    full = "ERROR: unexpected error - [Errno 28] No space left on device: '/w/.dvc/tmp/lock'"
    assert [
        dvc_repro._dvc_exit_code(255, f"[Errno 111]\n{full}"),
        dvc_repro._dvc_exit_code(-9, ""),
        dvc_repro._dvc_exit_code(255, "ERROR: x: disk I/O error"),
    ] == [
        75,
        -9,
        75,
    ]
    assert dvc_repro._dvc_exit_code(255, f"{warned}ERROR: unexpected error - [Errno 30] Read-only file system: 'out'") == 2


def test_a_name_that_looks_like_an_option_never_reaches_dvc(project: Path) -> None:
    with pytest.raises(InputError, match="no name of a stage"):
        dvc_repro.reproduce("--force")


def test_a_pipeline_that_dvc_cannot_read_is_an_input_error(project: Path) -> None:
    (project / "dvc.yaml").write_text("stages: {first: {cmd: [}}")
    with pytest.raises(InputError):
        dvc.graph()


def test_a_database_of_dvc_that_takes_nothing_is_worth_another_try(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr("dvc.repo.Repo.status", full)
    with pytest.raises(TryAgainError, match=r"its database cannot be written \(disk I/O error\); see the room"):
        dvc.status()


def test_a_result_survives_a_lock_that_is_held_while_the_stage_ends(project: Path) -> None:
    # DVC alone waits 3 s for its lock, then leaves the finished stage unrecorded.
    (project / "stage.py").write_text("import time; time.sleep(2)\n" + (project / "stage.py").read_text())
    held = "import time; from dvc.repo import Repo; lock = Repo().lock; lock.lock(); print(1, flush=True); time.sleep(8)"
    stage = subprocess.Popen(
        [*dvc.DVC, "--wait-for-lock", "repro", "-s", "first"], stdout=subprocess.PIPE, env=dvc.environment()
    )
    assert stage.stdout is not None
    assert b"Running stage 'first'" in stage.stdout.readline()
    holder = subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE)
    began = time.monotonic()
    stage.communicate(timeout=60)
    holder.wait()
    assert stage.returncode == 0
    assert time.monotonic() - began > 3
    assert "first" not in dvc.status()


def test_cells_side_by_side_leave_a_lock_file_with_all_of_them(project: Path) -> None:
    cells = ["one", "two", "three"]
    stages = {cell: {"cmd": f"python stage.py {cell} raw.txt", "deps": ["raw.txt"], "outs": [f"out/{cell}"]} for cell in cells}
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    for _ in range(2):
        with ThreadPoolExecutor(len(cells)) as threads:
            assert list(threads.map(dvc_repro.reproduce, cells)) == ["ran"] * 3
        assert set(yaml.safe_load((project / "dvc.lock").read_text())["stages"]) == set(cells)
        assert dvc.status() == {} and dvc_repro.reproduce_all() == "unchanged"
        (project / "raw.txt").write_text("another")


# Says which process it is, then works for ever; in place of a training.
TRAINER = """
import os, time
from pathlib import Path
from components.process import exit_from
def main():
    Path("trainer.pid").write_text(str(os.getpid()))
    time.sleep(600)
exit_from(main)
"""


def trainer(project: Path) -> psutil.Process:
    pid = project / "trainer.pid"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    return psutil.Process(int(pid.read_text()))


def ends(process: psutil.Process, within_s: float = 60) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_missing_dvc_yaml_is_told(project: Path) -> None:
    (project / "dvc.yaml").unlink()
    with pytest.raises(InputError, match=r"`git checkout dvc\.yaml` brings it back"):
        dvc.graph()


def test_a_killed_dvc_leaves_no_training_behind(project: Path) -> None:
    (project / "stage.py").write_text(TRAINER)
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            dvc_repro.reproduce("first", {"PYTHONPATH": str(ROOT)})
        except dvc_repro.StageFailed as error:
            outcome.append(error)

    flow = threading.Thread(target=run)
    flow.start()
    training = trainer(project)
    above = next(p for p in training.parents() if "dvc" in p.cmdline())
    above.send_signal(signal.SIGKILL)
    assert ends(training)
    flow.join(60)
    assert [error.exit_code for error in outcome] == [TryAgainError.exit_code]  # type: ignore[attr-defined]


def test_a_killed_flow_leaves_neither_dvc_nor_a_training_behind(project: Path) -> None:
    (project / "stage.py").write_text(TRAINER)
    code = "from flows import dvc_repro; dvc_repro.reproduce('first')"
    flow = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    training = trainer(project)
    above = next(p for p in training.parents() if "dvc" in p.cmdline())
    flow.kill()
    flow.wait()
    assert ends(above) and ends(training)


def test_a_stopped_stage_leaves_no_lock_of_which_dvc_warns(project: Path) -> None:
    (project / "stage.py").write_text(TRAINER)
    begun = project / "trainer.pid"
    with pytest.raises(dvc_repro.StageFailed, match="enough"):
        dvc_repro.reproduce("first", {"PYTHONPATH": str(ROOT)}, stop_when=lambda: "enough" if begun.exists() else None)
    assert json.loads((project / ".dvc/tmp/rwlock").read_text()) == {"write": {}, "read": {}}


def test_a_remote_that_does_not_answer_is_told_without_its_password(project: Path) -> None:
    (project / ".dvc/config").write_text(
        f"[core]\n    no_scm = True\n    remote = theirs\n['remote \"theirs\"']\n    url = {REMOTE}\n"
    )
    (project / "data.dvc").write_text(f"outs:\n- md5: {'a' * 32}\n  size: 1\n  path: data\n")
    with pytest.raises(InputError, match=r"`dvc pull data\.dvc` failed: (?s:.+)neither locally nor on remote") as failure:
        dvc.fetch("data.dvc")
    assert CANARY not in str(failure.value)


def test_what_ails_the_pool_is_told(project: Path) -> None:
    def pool(url: object) -> None:
        (project / ".dvc/config").write_text(f"[core]\n    no_scm = True\n['remote \"pool\"']\n    url = {url}\n")

    dvc_repro.reproduce("first")
    (project / "file").touch()
    pool(project / "file")
    with pytest.raises(TryAgainError, match=r"--remote pool` failed: (?s:.+)Not a directory"):
        dvc.push_to_pool()
    pool("http://127.0.0.1:9/pool")
    with pytest.raises(InputError, match=r"run-cache is not supported for http.*another kind of address"):
        dvc.restore("last")
