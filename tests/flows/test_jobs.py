"""What else would change, or read, the folder of a running job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from components.errors import TryAgainError
from flows import dvc, dvc_repro, jobs
from tests.flows.conftest import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
USE = ("components.cli", "use", "smoke")


def run_module(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *args], env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture
def job(project: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`dvc repro` in its first stage, which does not end."""
    (project / "stage.py").write_text("import time; open('begun', 'w').close(); time.sleep(600)")
    command, environment = [sys.executable, "-m", "dvc", "repro"], dvc.environment()
    job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (project / "begun").exists():
        time.sleep(0.05)
    yield job
    kill(job)


def kill(job: subprocess.Popen[bytes]) -> None:
    """Kill it with its stage."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def test_beside_a_running_job_params_stay_and_a_second_job_does_not_begin(project: Path, job: subprocess.Popen[bytes]) -> None:
    params = {path: path.read_bytes() for path in (project / "params").glob("*.yaml")}
    message = f"TryAgainError: `dvc repro` (process {job.pid}) is running in this folder; try again when it has ended\n"
    for args in (USE, ("components.cli", "study", "expand", "smoke"), ("components.cli", "plan"), ("flows.parallel",)):
        refused = run_module(*args)
        assert (refused.returncode, refused.stderr) == (75, message), args
    assert params == {path: path.read_bytes() for path in params}


def test_a_stage_that_another_job_runs_may_be_tried_again(job: subprocess.Popen[bytes]) -> None:
    with pytest.raises(TryAgainError, match="is busy"):
        dvc.status()
    with pytest.raises(dvc_repro.StageFailed) as failure:
        dvc_repro.reproduce("first")
    assert failure.value.exit_code == TryAgainError.exit_code


def test_a_killed_job_is_none(project: Path, job: subprocess.Popen[bytes]) -> None:
    kill(job)
    assert str(job.pid) in (project / ".dvc/tmp/rwlock").read_text()
    assert run_module(*USE).returncode == 0


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("/usr/bin/python /venv/bin/dvc repro", "dvc repro"),
        ("python -m dvc --wait-for-lock repro --single-item first", "dvc repro"),
        ("python -m dvc exp run", "dvc repro"),
        ("python -m flows.parallel --jobs 2", "make repro"),
        ("python -m flows.pipeline", "make flow"),
        ("python -m dvc status", None),
        ("timeout 60 python -m flows.parallel", None),  # the Python under it is one, and this no other
        ("make repro", None),
        ("", None),
    ],
)
def test_a_job_is_known_by_its_command_line(line: str, name: str | None) -> None:
    assert jobs._job(line.split()) == name
