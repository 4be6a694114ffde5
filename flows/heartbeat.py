"""Heartbeat of flow runs and workers on this machine: a lock file each, held for the life of the process.

The end of a run is reported by the run itself or its worker; if both are killed, it stays `Running` on the server, and its
slots stay taken. The kernel frees a lock in any case.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import select
import threading
from pathlib import Path
from typing import IO

from components.process import is_free
from components.records.paths import RUNS

FOLDER, WORKERS = RUNS / "flow-runs", RUNS / "workers"
_locks: list[IO[str]] = []  # open, and so locked, until this process ends


def announce(name: str, folder: Path = FOLDER) -> None:
    """Hold the lock of flow run `name` (its id), or in `WORKERS` of a worker (its pid), until this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / name).resolve()
    file = path.open("a")
    fcntl.flock(file, fcntl.LOCK_EX)
    _locks.append(file)
    atexit.register(path.unlink, missing_ok=True)


def outlive_output() -> None:
    """Redirect stdout and stderr to /dev/null once nobody reads them, as when the worker was killed.

    Otherwise the log line at the end raises (rich: SystemExit), and the end is never reported to the server.
    """

    def watch() -> None:
        poller = select.poll()
        for stream in (1, 2):
            poller.register(stream, 0)
        poller.poll()  # error events only
        devnull = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(devnull, stream)

    threading.Thread(target=watch, daemon=True).start()


def dead_runs() -> list[str]:
    """Ids of dead runs of this machine: their lock files exist, and no process holds them."""
    return [file.name for file in sorted(FOLDER.glob("*")) if is_free(file)]


def workers() -> list[int]:
    """Pids of the live `alignti worker` processes of this folder on this machine."""
    return [int(file.name) for file in WORKERS.glob("*") if not is_free(file)]


def forget(run: str) -> None:
    (FOLDER / run).unlink(missing_ok=True)
