"""Accelerators of this machine, one stage at a time on each.

A lock file per GPU says that it is taken: the kernel frees it when its holders die, which no server's count of slots does. Its
holders are the flow that asked for it and the stage that runs on it (components/process.py): a training that outlives a killed
flow, because it saves, keeps it until it ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import IO

from components.process import LOCK

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOCKS = Path(tempfile.gettempdir()) / f"alignti-gpus-{os.getuid()}"  # lock files of the machine: clones share its GPUs
NONE = ("", "-1", "NoDevFiles")
PAUSE_S = 2


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none without NVIDIA's driver."""
    if VISIBLE in os.environ:
        named = (gpu.strip() for gpu in os.environ[VISIBLE].split(","))
        return list(takewhile(lambda gpu: gpu not in NONE, named))  # CUDA stops at the first that is none
    if shutil.which("nvidia-smi") is None:
        return []
    told = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return told.stdout.split() if told.returncode == 0 else []


@contextmanager
def one() -> Iterator[dict[str, str]]:
    """Hold a free GPU, waiting for one; gives the environment that shows a stage this GPU alone ({} where there are none)."""
    there = gpus()
    if not there:
        yield {}
        return
    gpu, lock = _free(there)
    with lock:
        yield {VISIBLE: gpu, LOCK: lock.name}


def _free(there: list[str]) -> tuple[str, IO[str]]:
    LOCKS.mkdir(mode=0o700, exist_ok=True)
    while True:
        for gpu in there:
            lock = (LOCKS / gpu.replace("/", "_")).open("w")
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else has it,
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # and now it may be shared with the stage
                return gpu, lock
            lock.close()
        time.sleep(PAUSE_S)
