"""What can go wrong, and the exit code that says so: 2 your input, 75 try again, 143 interrupted but resumable."""

from __future__ import annotations

import ctypes
import difflib
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from components.redact import redacted

LOCK = "ALIGNTI_DEVICE_LOCK"  # the lock file of the device that a stage was given, flows/devices.py


class AlignTIError(Exception):
    """Root of every error that this project raises on purpose. The message says what, where, and what to do, and no secret:
    it ends in logs and on servers."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class InputError(AlignTIError):
    """A file, a setting or an argument is wrong: running it again changes nothing."""


class SettingsError(InputError):
    """One or more problems in `params/`; the message lists all of them."""


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """`name` is no `what`: the nearest of those that are known, and all of them."""
    listed = list(known)
    near = difflib.get_close_matches(name, listed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"there is no {what} {name!r}; {hint}there are {', '.join(listed) or 'none'}")


class ModelError(InputError):
    """A checkpoint, tokenizer or processor that cannot be used as asked."""


class DataError(InputError):
    """A data set, shard or sample that cannot be used as asked."""


class TryAgainError(AlignTIError):
    """A fault that may pass: no network, a full disk, a busy lock."""

    exit_code = 75


class Interrupted(AlignTIError):
    """Stopped by a signal after saving; the same command goes on from there."""

    exit_code = 143


@contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """Turn SIGTERM into `Interrupted`, so that `finally` blocks run before the process goes."""

    def interrupt(signum: int, _frame: object) -> None:
        raise Interrupted(f"stopped by signal {signum}; run the same command to go on")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


def _check_folder() -> None:
    """Raises InputError in a folder below the project's: every path here is relative to its root."""
    here = Path.cwd()
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
    except OSError as error:
        if error.errno == 28:
            print(f"TryAgainError: the disk is full ({error.filename}); free space and run again", file=sys.stderr)
            sys.exit(TryAgainError.exit_code)
        raise
