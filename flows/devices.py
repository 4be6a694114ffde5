"""GPUs of this machine, one stage at a time on each.

Each GPU has a lock file: the kernel frees the lock when its holders die, unlike a slot that a server counts. Its holders are
the flow that takes the GPU and the stage that runs on it (components/process.py): a training that outlives a killed flow,
because it saves a checkpoint, keeps the GPU until it ends.
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
    """GPUs visible to this process, in the notation of CUDA_VISIBLE_DEVICES; none without NVIDIA's driver."""
    if VISIBLE in os.environ:
        names = (gpu.strip() for gpu in os.environ[VISIBLE].split(","))
        return list(takewhile(lambda gpu: gpu not in NONE, names))  # CUDA stops at the first invalid entry
    if shutil.which("nvidia-smi") is None:
        return []
    result = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return result.stdout.split() if result.returncode == 0 else []


@contextmanager
def lock_gpu() -> Iterator[dict[str, str]]:
    """Lock a free GPU, waiting for one; yields the environment with that GPU alone ({} on a machine without GPUs)."""
    visible_gpus = gpus()
    if not visible_gpus:
        yield {}
        return
    gpu, lock = _lock_free_gpu(visible_gpus)
    with lock:
        yield {VISIBLE: gpu, LOCK: lock.name}


def _lock_free_gpu(visible_gpus: list[str]) -> tuple[str, IO[str]]:
    LOCKS.mkdir(mode=0o700, exist_ok=True)
    while True:
        for gpu in visible_gpus:
            lock = (LOCKS / gpu.replace("/", "_")).open("w")
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # exclusive: nobody else has it;
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # then shared with the stage
                return gpu, lock
            lock.close()
        time.sleep(PAUSE_S)
