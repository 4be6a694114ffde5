"""The interface to DVC (beside `dvc_locks`). Stages run in `dvc` subprocesses: its locks do not hold between threads.

Always `--wait-for-lock`: DVC must lock again after a stage has run, and without it gives up after 3 s, losing the result.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from components.errors import NO_ROOM, AlignTIError, InputError, Interrupted, TryAgainError, unknown
from components.process import end_with_parent
from components.tracking import provenance
from flows import dvc_locks
from flows.jobs import check_idle

DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]
POOL = "pool"  # DVC remote for results, between machines without a shared cache
STAGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")  # no leading dash, which would be an option
GRACE_S = 20  # between SIGTERM and SIGKILL of a stage
WATCH_S = 1  # polling interval of a running stage
BAR_S = 15  # between two printed states of a labelled progress bar

Outcome = Literal["unchanged", "restored", "ran"]
StopWhen = Callable[[], str | None]  # called each second while a stage runs; a reason ends the stage
LineCallback = Callable[[str], None]  # takes a line with its ending, a carriage return for a redrawn progress bar
_running: set[subprocess.Popen[bytes]] = set()
_start_lock = threading.Lock()
_stop_requested = threading.Event()
_repo_lock = threading.Lock()  # DVC's objects are not thread-safe

BAR = re.compile(r"(\d+)%\|")
DVC_HINTS = re.compile(
    r"to track the changes with git|git add|to enable auto staging|dvc config core|dvc push|ing lock file", re.IGNORECASE
)
WARNING = re.compile(r"\bwarning\b|^tracking: |^ERROR", re.I)

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


def graph(targets: Sequence[str] = ()) -> dict[str, list[str]]:
    """Stages of `dvc.yaml` (`targets`: those and their dependencies) in topological order, each with the stages that it needs.
    Raises InputError."""
    import networkx
    from dvc.stage import PipelineStage

    edges = _query_dvc("DVC cannot read the pipeline", lambda repo: repo.index.graph)  # from a stage to what it depends on
    order = [stage for stage in networkx.topological_sort(edges.reverse()) if isinstance(stage, PipelineStage)]
    needs = {
        stage.addressing: sorted(d.addressing for d in edges.successors(stage) if isinstance(d, PipelineStage))
        for stage in order
    }
    for target in targets:
        if target not in needs:
            raise unknown("stage", target, needs)
    selected = set(targets) or set(needs)
    for stage in reversed(needs):
        selected |= set(needs[stage]) if stage in selected else set()
    return {stage: upstream for stage, upstream in needs.items() if stage in selected}


def status() -> dict[str, list[object]]:
    """Changes per stage, as in `dvc status --json`; empty when everything is up to date.

    Raises InputError, or TryAgainError while a stage writes what is asked for.
    """
    changes: dict[str, list[object]] = _query_dvc("`dvc status` failed", lambda repo: repo.status())
    return changes


def _query_dvc(failure: str, query: Callable[[Any], Any]) -> Any:
    """Result of a query to DVC's library; `failure` begins the message of its errors as ours."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo, lock_repo

    dvc_locks.drop_stale_holders()
    provenance.raw()  # raises DataError for a damaged .dvc file, which is a KeyError of DVC's
    try:
        with _repo_lock, Repo(_wait_for_lock=True) as repo, lock_repo(repo):  # dvc.lock is not being rewritten
            try:
                result = query(repo)
            except DvcException as error:
                if isinstance(error, LockError) or not dvc_locks.restore_backup():
                    raise
                repo._reset()
                result = query(repo)
            dvc_locks.back_up()
            return result
    except LockError as error:
        check_idle()  # names what runs
        raise TryAgainError(f"{failure}: {_with_remedy(error)}") from None
    except sqlite3.Error as error:
        raise TryAgainError(
            f"{failure}: its database cannot be written ({error}); see the room and limits of `dvc config core.site_cache_dir`,"
            " else /var/tmp/dvc"
        ) from None
    except DvcException as error:
        raise InputError(f"{failure}: {_with_remedy(error)}") from None


def _with_remedy(error: Exception) -> str:
    """DVC's message, with a remedy if one is known."""
    message = " ".join(str(error).split())
    if "dvc.lock" in message:
        return f"{message}; `git checkout dvc.lock`, or remove it: DVC's cache knows what has run"
    if "is not a git repository" in message:
        return f"{message}; `git init` makes it one, or `dvc config core.no_scm true` does without"
    return message


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


def restore(stage: str) -> bool:
    """Restore the stage's outputs for the current inputs from the cache or the pool's remote; False if neither has them.

    `reproduce` then finds them and writes `dvc.lock`.
    """
    with _repo_lock:
        return _restore(stage) or (_has_pool() and _restore(stage, config={"core": {"remote": POOL}}))


def _restore(stage: str, config: dict[str, dict[str, str]] | None = None) -> bool:
    from dvc.dependency.base import DependencyDoesNotExistError
    from dvc.repo import Repo
    from dvc.stage.cache import RunCacheNotFoundError

    with Repo(config=config, _wait_for_lock=True) as repo, repo.lock:
        (dvc_stage,) = repo.stage.collect(stage)
        try:
            if config:
                repo.stage_cache.pull(None)
            dvc_stage.save_deps()
            repo.stage_cache.restore(dvc_stage, pull=config is not None)
        except (RunCacheNotFoundError, DependencyDoesNotExistError):
            return False
    return True


def _has_pool() -> bool:
    from dvc.config import Config

    return POOL in Config(str(Path(".dvc").resolve()))["remote"]


def fetch(target: str) -> None:
    """Pull the data of a .dvc file from the cache or the remote. Raises InputError."""
    result = _run_dvc("pull", "--quiet", target)
    if result.returncode:
        raise InputError(f"`dvc pull {target}` failed: {result.stderr.strip()[-2000:]}")


def share(folder: Path) -> None:
    """Configure the worktree at `folder` with this clone's cache and local DVC configuration."""
    from dvc.config import Config
    from dvc.repo import Repo

    local_config = Config(str(Path(".dvc").resolve())).load_one("local")  # paths made absolute
    with Repo() as repo:
        local_config["cache"]["dir"] = str(Path(repo.cache.local_cache_dir).resolve())
    with Config(str(folder / ".dvc")).edit("local") as config:
        config.update(local_config)


def push_to_pool() -> None:
    """Push outputs and run cache to the pool's remote, if there is one. Raises TryAgainError."""
    if not _has_pool():
        return
    result = _run_dvc("push", "--quiet", "--run-cache", "--remote", POOL)
    if result.returncode:
        raise TryAgainError(f"`dvc push --run-cache --remote {POOL}` failed: {result.stderr.strip()[-2000:]}")


def checkout_folder(md5: str, folder: Path) -> None:
    """Check out the folder with DVC's `md5` (`....dir`) at `folder`, from the cache, else the remote. Raises InputError."""
    from dvc.exceptions import DvcException
    from dvc.fs import localfs
    from dvc.repo import Repo
    from dvc_data.hashfile import load
    from dvc_data.hashfile.checkout import checkout
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_objects.errors import ObjectDBError, ObjectFormatError

    hash_info = HashInfo("md5", md5)
    with Repo() as repo:
        odb = repo.cache.local
        try:
            if not odb.exists(md5):
                repo.cloud.pull([hash_info])
            checkout(str(folder.resolve()), localfs, load(odb, hash_info), odb, force=True, quiet=True)
        except (DvcException, ObjectDBError, ObjectFormatError, OSError) as error:
            raise InputError(
                f"DVC has nothing under md5 {md5} here, in its cache or its remote ({' '.join(str(error).split())[:200]});"
                " `dvc push` where it was made, or point `dvc cache dir --local` at the cache of that folder"
            ) from None


def _run_dvc(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DVC, *args], capture_output=True, text=True, env=_environment())


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
            env=_environment() | dict(env or {}),
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
            _restore_lock_file()
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


def _restore_lock_file() -> None:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with suppress(DvcException), _repo_lock, Repo(_wait_for_lock=True) as repo, repo.lock:
        dvc_locks.restore_backup()


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


class Labelled:
    """Printer of labelled lines, for several stages at once; of a progress bar one state per `BAR_S` seconds.

    Without `verbose` these, warnings, and on `close` the last line alone.
    """

    def __init__(self, label: str, verbose: bool) -> None:
        self._label, self._verbose, self._printed_at, self._last = label, verbose, time.monotonic(), ""

    def __call__(self, line: str) -> None:
        bar, important = BAR.search(line), self._verbose or WARNING.search(line)
        due = time.monotonic() - self._printed_at > BAR_S
        if (important and line.endswith("\n")) or ((important or bar) and due):
            self._print(line)
        elif not (important or bar or DVC_HINTS.search(line)):
            self._last = line

    def close(self) -> None:
        if self._last:
            self._print(self._last)

    def _print(self, line: str) -> None:
        self._printed_at = time.monotonic()
        sys.stdout.write(f"{self._label}: {line.strip().removeprefix(f'{self._label}: ')}\n")


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


def _environment() -> dict[str, str]:
    """Environment of DVC, with this Python first in PATH: a stage's `python` is looked up there.

    The shell is bash if available: it execs the stage, while dash stays between the two and hides DVC's death from the stage.
    """
    shell = shutil.which("bash") or os.environ.get("SHELL", "/bin/sh")
    bin_dir = os.path.dirname(sys.executable)  # noqa: PTH120  (resolving the link would leave the virtual environment)
    return {**os.environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}", "DVC_NO_ANALYTICS": "1", "SHELL": shell}
