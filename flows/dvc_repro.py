"""Stages, each run by `dvc repro` in a subprocess: DVC's locks do not hold between threads."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from components.errors import NO_ROOM, AlignTIError, InputError, Interrupted, TryAgainError
from components.process import end_with_parent
from flows import dvc_locks
from flows.dvc import DVC, environment, restore_lock_file

STAGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")  # no leading dash, which would be an option
GRACE_S = 20  # between SIGTERM and SIGKILL of a stage
WATCH_S = 1  # polling interval of a running stage

Outcome = Literal["unchanged", "restored", "ran"]
StopWhen = Callable[[], str | None]  # called each second while a stage runs; a reason ends the stage
LineCallback = Callable[[str], None]  # takes a line with its ending, a carriage return for a redrawn progress bar
_running: set[subprocess.Popen[bytes]] = set()
_start_lock = threading.Lock()
_stop_requested = threading.Event()

_RAN = re.compile(r"^Running stage '", re.MULTILINE)
_RESTORED = re.compile(r"^Stage '.*' is cached - skipping run", re.MULTILINE)
_BUSY = "it is being blocked by"  # another command of DVC
_NO_DATABASE = ("database or disk is full", "disk I/O error")  # SQLite's


class StageFailed(AlignTIError):
    """Failed stage; `exit_code` is the stage's own if DVC reports it (75: retry), or 75 if a signal killed it: it resumes."""

    def __init__(self, stage: str, exit_code: int, output: str) -> None:
        reason, self.exit_code = f"failed with exit code {exit_code}", exit_code
        signum = -exit_code if exit_code < 0 else exit_code - 128 if 128 < exit_code <= 192 else 0  # by Python or a shell
        if signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.exit_code = Interrupted.exit_code
        elif signum:
            hint = " (out of memory?)" if signum == signal.SIGKILL else ""
            reason, self.exit_code = f"was killed by signal {signum}{hint}; run again to go on", TryAgainError.exit_code
        super().__init__(f"stage {stage} {reason}; the last it said:\n{output}")


def reproduce(
    stage: str,
    env: Mapping[str, str] | None = None,
    stop_when: StopWhen | None = None,
    force: bool = False,
    on_line: LineCallback | None = None,
) -> Outcome:
    """Run `stage` alone if it is stale; the caller takes care of the stages before it.

    `force`: run it even if DVC has its result. `on_line` is called with each line and each state of a progress bar that the
    stage prints; else they are forwarded as they are.

    Raises:
        StageFailed: with the stage's exit code.
    """
    if not STAGE.fullmatch(stage):
        raise InputError(f"{stage!r} is no name of a stage")
    return _repro(stage, [*(["--force"] if force else []), "--single-item", stage], env, stop_when, on_line)


def reproduce_all(targets: Sequence[str] = ()) -> Outcome:
    """Plain `dvc repro` (of `targets` and their dependencies): "unchanged" when it had nothing to do. Raises StageFailed."""
    return _repro("(all)", targets)


def stop_all() -> None:
    """Stop all running stages, each with its time to save, and start no more: this process is being stopped.

    A signal reaches the main thread alone; threads that wait for stages would wait on.
    """
    with _start_lock:
        _stop_requested.set()
        stoppers = [threading.Thread(target=_stop, args=[process]) for process in _running]
    for thread in stoppers:
        thread.start()
    for thread in stoppers:
        thread.join()


def wait_for_stop(timeout_s: float) -> bool:
    """Wait at most `timeout_s` for `stop_all`; true if it was called."""
    return _stop_requested.wait(timeout_s)


def _repro(
    stage: str,
    args: Sequence[str],
    env: Mapping[str, str] | None = None,
    stop_when: StopWhen | None = None,
    on_line: LineCallback | None = None,
) -> Outcome:
    with _start_lock:
        if _stop_requested.is_set():
            raise Interrupted(f"stage {stage} is not begun: this process is being stopped")
        dvc_locks.drop_stale_holders()
        process = subprocess.Popen(
            [*DVC, "repro", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment() | dict(env or {}),
            start_new_session=True,
            preexec_fn=end_with_parent,  # tied to the starting thread, which waits for this process
        )
        _running.add(process)
    try:
        with _watchdog(process, stop_when) as stop_reasons:
            output = _forward_output(process, _line_splitter(on_line) if on_line else sys.stdout.write)
            exit_code = process.wait()
    except BaseException:  # Ctrl-C, a cancelled flow: no stage may keep running unseen
        _stop(process)
        raise
    finally:
        _running.discard(process)
    if stop_reasons:
        raise StageFailed(stage, StageFailed.exit_code, stop_reasons[0])
    if exit_code:
        stage_exit = re.search(r"exited with (-?\d+)", output)
        if not stage_exit:
            restore_lock_file()
        raise StageFailed(
            stage, int(stage_exit[1]) if stage_exit else _dvc_exit_code(exit_code, output), output[-2000:].strip()
        )
    if not _running:
        dvc_locks.back_up()
    return "ran" if _RAN.search(output) else "restored" if _RESTORED.search(output) else "unchanged"


def _dvc_exit_code(code: int, output: str) -> int:
    """Exit code for a fault of DVC itself, which has 251 to 255 for all: busy and full disks pass, others do not."""
    (*_, error) = re.split(r"^ERROR: ", output, flags=re.MULTILINE)  # the stage's own lines stand before it
    errno_match = re.search(r"\[Errno (\d+)\]", error)
    disk_full = errno_match is not None and int(errno_match[1]) in NO_ROOM
    transient = disk_full or any(sign in error for sign in (_BUSY, *_NO_DATABASE))
    return code if code < 0 else TryAgainError.exit_code if transient else InputError.exit_code


@contextmanager
def _watchdog(process: subprocess.Popen[bytes], stop_when: StopWhen | None) -> Iterator[list[str]]:
    """Watch the running process: stop it for a reason of `stop_when`, and stop its stage if DVC itself was killed."""
    reasons: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_S):
            if (process.poll() or 0) < 0:  # DVC was killed, and the stage under it was not
                _stop(process)
                return
            if stop_when and (reason := stop_when()):
                reasons.append(reason)
                _stop(process)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield reasons
    finally:
        done.set()
        watcher.join()


def _forward_output(process: subprocess.Popen[bytes], write: Callable[[str], object]) -> str:
    """Output of the process, written as it arrives (progress bars too)."""
    assert process.stdout is not None
    output = b""
    while chunk := os.read(process.stdout.fileno(), 65536):
        write(chunk.decode("utf-8", "replace"))
        sys.stdout.flush()
        output += chunk
    return output.decode("utf-8", "replace")


def _line_splitter(on_line: LineCallback) -> Callable[[str], None]:
    partial = ""

    def write(text: str) -> None:
        nonlocal partial
        *lines, partial = re.split("(?<=[\r\n])", partial + text)
        for line in filter(str.strip, lines):
            on_line(line)

    return write


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop DVC and its stage: SIGTERM, so that a training can save, then SIGKILL."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)  # raises once the whole group is gone
                time.sleep(0.1)
        except ProcessLookupError:
            break
    dvc_locks.drop_stale_holders()
