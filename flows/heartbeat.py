"""Heartbeat of flow runs and workers on this machine: a lock file each, held as long as its process lives.

A server hears of the end of a run only from the run itself or from its worker; killed together they leave it `Running`, and the
slots that it held taken. The kernel frees a lock whatever happens.
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
_held: list[IO[str]] = []  # open, and so locked, until this process ends


def announce(name: str, folder: Path = FOLDER) -> None:
    """Be seen as the process of flow run `name` (its id), or in `WORKERS` of a worker (its pid), until this one ends."""
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / name).resolve()
    file = path.open("a")
    fcntl.flock(file, fcntl.LOCK_EX)
    _held.append(file)
    atexit.register(path.unlink, missing_ok=True)


def outlive_output() -> None:
    """When nobody reads what this process says any more, as when its worker was killed, let it speak to nobody.

    Else the log's line that tells of the end raises (rich: SystemExit), and the server is never told.
    """

    def watch() -> None:
        unheard = select.poll()
        for stream in (1, 2):
            unheard.register(stream, 0)
        unheard.poll()  # nothing is waited for but errors
        nobody = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nobody, stream)

    threading.Thread(target=watch, daemon=True).start()


def left() -> list[str]:
    """The ids of the runs that were here and died: their files are there, and nobody holds them."""
    return [file.name for file in sorted(FOLDER.glob("*")) if is_free(file)]


def workers() -> list[int]:
    """The pids of the `alignti worker` of this folder that live on this machine."""
    return [int(file.name) for file in WORKERS.glob("*") if not is_free(file)]


def forget(run: str) -> None:
    (FOLDER / run).unlink(missing_ok=True)
