"""Process control: exit codes, signals, parent death, file locks, and a pool over the CPU cores.

A lock (flock) is freed by the kernel when the process that holds it dies, in whatever way.
"""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from components.errors import AlignTIError, InputError, Interrupted, TryAgainError, machine_error

EXPERIMENTS = (".dvc", "tmp", "exps")  # DVC's folder of copies of the project
LOCK = "ALIGNTI_DEVICE_LOCK"  # environment variable: lock file of the stage's device (flows/devices.py)


@contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """Turn the first SIGTERM or SIGHUP into `Interrupted`, so that `finally` blocks run before the process ends.

    Later ones are ignored: they would break off those blocks. A dying parent sends several, see `end_with_parent`.
    """
    interrupted = False

    def interrupt(signum: int, _frame: object) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise Interrupted(f"stopped by signal {signum}; run the same command to go on")

    previous_handlers = {number: signal.signal(number, interrupt) for number in endings()}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def endings() -> list[signal.Signals]:
    """Termination signals: SIGTERM, and SIGHUP (a closed terminal) unless it is ignored (nohup)."""
    return [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]


def end_with_parent(signum: signal.Signals = signal.SIGTERM) -> None:
    """Parent-death signal: the kernel sends SIGTERM when the parent dies, in whatever way (Linux; elsewhere a no-op).

    A killed DVC or worker then leaves no training behind that holds a GPU. The kernel signals once per thread of the parent
    that ends, so several times if it was killed (`signum`: another signal, for a handler that sees to that).
    """
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(parent_death_signal, signum)


def terminate_once_with_parent() -> None:
    """`end_with_parent` with a single SIGTERM, for handlers that raise at each: Prefect's, torch elastic's."""
    sent = False

    def terminate(_signum: int, _frame: object) -> None:
        nonlocal sent
        if not sent:
            sent = True
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGUSR2, terminate)
    end_with_parent(signal.SIGUSR2)


def share_lock() -> None:
    """Shared lock on the stage's device, beside the lock of the flow that assigned it, until this process ends."""
    if path := os.environ.get(LOCK):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # closed by the kernel alone
        fcntl.flock(descriptor, fcntl.LOCK_SH)


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Exclusive lock on `path` during the block. If another process holds it: wait, or raise TryAgainError with `busy`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise TryAgainError(f"{busy} ({path} is held); wait for it or stop it") from None
        yield


def is_free(path: Path) -> bool:
    """Whether the lock file exists and no process holds it."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except (BlockingIOError, FileNotFoundError):
        return False


def runs_module(command: Sequence[str], module: str) -> bool:
    """Whether a process with this command line runs `python -m module`, or the script of that name."""
    return list(command[1:3]) == ["-m", module] or any(Path(argument).name == module for argument in command[:2])


def _check_folder() -> None:
    """Raises InputError in a subfolder of the project or a removed folder: all paths are relative to its root."""
    try:
        cwd = Path.cwd()
    except FileNotFoundError:
        raise InputError("the folder that this command was started in is no longer there; cd to the project's") from None
    if not Path("params").is_dir() and not {"--help", "-h", "--version"} & set(sys.argv[1:]):
        for root in cwd.parents:
            if (root / "params").is_dir() and (root / "dvc.yaml").is_file():
                raise InputError(f"{cwd} is a folder of the project in {root}: run it there (cd {os.path.relpath(root)})")


def project() -> Path:
    """This folder; in a copy, which `dvc exp run --temp` and `--queue` work in and remove, the project's."""
    cwd = Path.cwd()
    return next((folder.parents[2] for folder in cwd.parents if folder.parts[-3:] == EXPERIMENTS), cwd)


def _keep_runs() -> None:
    """Link a copy's `.runs` and `.mlflow` to the project's."""
    for name in (".runs", ".mlflow") if project() != Path.cwd() else ():
        (project() / name).mkdir(exist_ok=True)
        with suppress(FileExistsError):
            Path(name).symlink_to(project() / name)


def exit_from(main: Callable[[], None]) -> None:
    """Run a stage's `main` and exit with the error's code; errors of this project print as one line without a traceback."""
    try:
        with _terminate_as_exception():
            _check_folder()
            if "DVC_STAGE" in os.environ:
                terminate_once_with_parent()
                share_lock()
                _keep_runs()
            main()
            sys.stdout.flush()
    except AlignTIError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("Interrupted: run the same command to go on", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
    except BrokenPipeError:  # what read this output has ended, as `| head` does
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        sys.exit(Interrupted.exit_code)
    except Exception as error:
        if (fault := machine_error(error)) is None:
            raise
        print(f"{type(fault).__name__}: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)


def announce_loading() -> None:
    """Line on a terminal before imports of some four seconds."""
    if sys.stderr.isatty():
        print("loading torch and transformers ...", file=sys.stderr)


T = TypeVar("T")


def cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_out(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[T]:
    """Results of `function(*job)` from a process pool, as they complete; with one worker or job in this process, in order.

    Raises TryAgainError if a worker was killed, and any exception of a job; running jobs are finished first.
    """
    if min(workers, len(jobs)) <= 1:
        yield from (function(*job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # fork may deadlock beside the tracker's threads
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_initialize_worker) as pool:
        try:
            for future in as_completed([pool.submit(function, *job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool:
            raise TryAgainError(
                "a process that shared the work was killed, for want of memory perhaps; run again to go on, with fewer:"
                " ALIGNTI_WORKERS=1"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _initialize_worker() -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and lets running jobs finish
