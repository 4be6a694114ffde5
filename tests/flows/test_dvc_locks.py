from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.errors import InputError
from flows import dvc, dvc_locks, dvc_repro


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "a zombie"])
def test_locks_of_the_dead_are_dropped_and_those_of_the_living_stay(project: Path, reaped: bool) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    rwlock = project / ".dvc/tmp/rwlock"
    rwlock.parent.mkdir()
    live, stale = ({"pid": pid, "cmd": "dvc repro"} for pid in (os.getpid(), dead.pid))
    held = {"write": {"a": stale, "b": live}, "read": {"c": [stale, live], "d": [stale]}}
    rwlock.write_text(json.dumps(held))
    dvc_locks.drop_stale_holders()
    assert json.loads(rwlock.read_text()) == {"write": {"b": live}, "read": {"c": [live]}}
    dead.wait()


@pytest.mark.parametrize("cut", ["  cell", "deps:\n"], ids=["no YAML", "no lock file"])
def test_a_lock_file_that_a_kill_cut_off_is_that_from_before(
    project: Path, capsys: pytest.CaptureFixture[str], cut: str
) -> None:
    lock = project / "dvc.lock"
    dvc_repro.reproduce("first")
    previous = lock.read_text()
    dvc_repro.reproduce("cell@a")
    complete = lock.read_text()
    dvc_locks.BACKUP.write_text(previous)
    lock.write_text(complete[: complete.index(cut, complete.index("cell@a") - 2) + len(cut)])
    assert "cell@a" in dvc.status()
    assert "dvc.lock was cut off" in capsys.readouterr().out
    assert dvc_repro.reproduce("cell@a") == "restored"
    assert yaml.safe_load(lock.read_text()) == yaml.safe_load(complete)
    lock.write_text(f"<<<<<<< HEAD\n{complete}")
    with pytest.raises(InputError, match=r"`git checkout dvc\.lock`"):
        dvc.graph()


def test_a_stage_whose_dvc_is_killed_at_the_lock_file_runs_again(project: Path) -> None:
    dvc_repro.reproduce("first")
    previous = (project / "dvc.lock").read_text()
    killed = "import os, signal, sys; open('dvc.lock', 'w').write(': no YAML'); os.kill(os.getppid(), signal.SIGKILL)"
    stage = (project / "stage.py").read_text()
    (project / "stage.py").write_text(f"{killed}\n{stage}")
    with pytest.raises(dvc_repro.StageFailed, match="killed by signal 9") as failure:
        dvc_repro.reproduce("cell@a")
    assert failure.value.exit_code == 75
    assert (project / "dvc.lock").read_text() == previous
    (project / "stage.py").write_text(stage)
    assert dvc_repro.reproduce("cell@a") == "ran"
