"""Jobs of a folder, by the processes of this machine: DVC's own locks are free between two stages of a job, and outlive a
killed one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from components.errors import TryAgainError
from components.process import runs_module

JOBS = {"flows.parallel": "make repro", "flows.pipeline": "make flow", "dvc": "dvc repro"}  # by module


def check_idle() -> None:
    """Raises TryAgainError if a job that began before this process runs in this folder (not in a workspace of its own)."""
    import psutil  # a dependency of DVC

    own, cwd = psutil.Process(), str(Path.cwd())
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's, or ended meanwhile
            job = _job(process.cmdline())
            earlier = (process.create_time(), process.pid) < (own.create_time(), own.pid)  # of two at once one goes on
            if job and earlier and process.cwd() == cwd:
                raise TryAgainError(f"`{job}` (process {process.pid}) is running in this folder; try again when it has ended")


def _job(command: Sequence[str]) -> str | None:
    """Name of the job that a command line runs; of DVC's commands those that run stages."""
    module = next((module for module in JOBS if runs_module(command, module)), None)
    return JOBS[module] if module and (module != "dvc" or {"repro", "run"} & set(command)) else None
