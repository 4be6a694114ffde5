"""Processes of ours: exit codes, signals, the parent's death, locks of files, and work shared out over the cores.

A lock (flock) is freed by the kernel when the process that holds it dies, however that happens.
"""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from components.errors import AlignTIError, InputError, Interrupted, TryAgainError, of_disk, of_limits

LOCK = "ALIGNTI_DEVICE_LOCK"  # the lock file of the device that a stage was given, flows/devices.py


@contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Interrupted`, so that `finally` blocks run before the process goes."""

    def interrupt(signum: int, _frame: object) -> None:
        leave_terminal(signum)
        raise Interrupted(f"stopped by signal {signum}; run the same command to go on")

    before = {number: signal.signal(number, interrupt) for number in endings()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def endings() -> list[signal.Signals]:
    """Signals that ask this process to end: SIGHUP, of a terminal that is closed, unless it is to outlive that (nohup)."""
    return [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]


def leave_terminal(signum: int) -> None:
    """After SIGHUP, throw away what is still to be printed to a terminal: it is gone, and printing raises."""
    for number in (1, 2) if signum == signal.SIGHUP else ():
        if stat.S_ISCHR(os.fstat(number).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def end_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when the one that started it dies, however it dies (Linux; else nothing).

    A killed DVC or worker then leaves no training behind that holds a GPU.
    """
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


def share_lock() -> None:
    """Hold the lock of the device that this process was given, beside the flow that gave it, until this process ends."""
    if path := os.environ.get(LOCK):
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # never closed, but by the kernel
        fcntl.flock(held, fcntl.LOCK_SH)


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold `path` for the time of the block. While another process holds it, wait, or raise TryAgainError that says `busy`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise TryAgainError(f"{busy} ({path} is held); wait for it or stop it") from None
        yield


def is_free(path: Path) -> bool:
    """Whether it is there and no process holds it."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except (BlockingIOError, FileNotFoundError):
        return False


def _check_folder() -> None:
    """Raises InputError in a folder below the project's, or one that was removed: every path here is relative to its root."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        raise InputError("the folder that this command was started in is no longer there; cd to the project's") from None
    if not Path("params").is_dir() and not {"--help", "-h", "--version"} & set(sys.argv[1:]):
        for root in here.parents:
            if (root / "params").is_dir() and (root / "dvc.yaml").is_file():
                raise InputError(f"{here} is a folder of the project in {root}: run it there (cd {os.path.relpath(root)})")


def exit_from(main: Callable[[], None]) -> None:
    """Run a stage's `main` and leave with the exit code of what happened; our errors print as one sentence, no trace."""
    try:
        with _terminate_as_exception():
            _check_folder()
            if "DVC_STAGE" in os.environ:
                end_with_parent()
                share_lock()
            main()
    except AlignTIError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("Interrupted: run the same command to go on", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
    except Exception as error:
        if (told := of_disk(error) or of_limits(error)) is None:
            raise
        print(f"{type(told).__name__}: {told}", file=sys.stderr)
        sys.exit(told.exit_code)


T = TypeVar("T")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_out(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[T]:
    """`function(*job)` of every job, in whatever order they end; with one worker here, in their own.

    Raises TryAgainError if a worker was killed, and whatever a job raises; jobs under way are finished.
    """
    if workers <= 1:
        yield from (function(*job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # forking beside the tracker's threads may lock up
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_worker) as pool:
        try:
            for done in as_completed([pool.submit(function, *job) for job in jobs]):
                yield done.result()
        except BrokenProcessPool:
            raise TryAgainError(
                "a process that shared the work was killed, for want of memory perhaps; run again to go on, with fewer:"
                " ALIGNTI_WORKERS=1"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _worker() -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which lets jobs under way be finished
