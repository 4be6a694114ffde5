"""Work shared out over the cores of this machine, by processes that end with this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from components.errors import TryAgainError, end_with_parent

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
