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
StopWhen = Callable[[], str | None]  # asked each second while a stage runs; a reason ends the stage
Say = Callable[[str], None]  # takes a line with its ending, a carriage return for a redrawn progress bar
_running: set[subprocess.Popen[bytes]] = set()
_starting = threading.Lock()
_over = threading.Event()
_looking = threading.Lock()  # DVC's objects are not thread-safe

BAR = re.compile(r"(\d+)%\|")
TO_A_TERMINAL = re.compile(
    r"to track the changes with git|git add|to enable auto staging|dvc config core|dvc push|ing lock file", re.IGNORECASE
)
WARNING = re.compile(r"\bwarning\b|^tracking: |^ERROR", re.I)

_RAN = re.compile(r"^Running stage '", re.MULTILINE)
_RESTORED = re.compile(r"^Stage '.*' is cached - skipping run", re.MULTILINE)
_BUSY = "it is being blocked by"  # another command of DVC
_NO_DATABASE = ("database or disk is full", "disk I/O error")  # SQLite's


class StageFailed(AlignTIError):
    """Failed stage; `exit_code` is the stage's own if DVC reports it (75: retry), or 75 if a signal killed it: it resumes."""

    def __init__(self, stage: str, exit_code: int, said: str) -> None:
        how, self.exit_code = f"failed with exit code {exit_code}", exit_code
        by = -exit_code if exit_code < 0 else exit_code - 128 if 128 < exit_code <= 192 else 0  # as Python or a shell tells it
        if by in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.exit_code = Interrupted.exit_code
        elif by:
            perhaps = " (out of memory?)" if by == signal.SIGKILL else ""
            how, self.exit_code = f"was killed by signal {by}{perhaps}; run again to go on", TryAgainError.exit_code
        super().__init__(f"stage {stage} {how}; the last it said:\n{said}")


def graph(targets: Sequence[str] = ()) -> dict[str, list[str]]:
    """Stages of `dvc.yaml` (`targets`: those and their dependencies) in topological order, each with the stages that it needs.
    Raises InputError."""
    import networkx
    from dvc.stage import PipelineStage

    edges = _asked("DVC cannot read the pipeline", lambda repo: repo.index.graph)  # from a stage to what it depends on
    order = [stage for stage in networkx.topological_sort(edges.reverse()) if isinstance(stage, PipelineStage)]
    needs = {
        stage.addressing: sorted(d.addressing for d in edges.successors(stage) if isinstance(d, PipelineStage))
        for stage in order
    }
    for target in targets:
        if target not in needs:
            raise unknown("stage", target, needs)
    wanted = set(targets) or set(needs)
    for stage in reversed(needs):
        wanted |= set(needs[stage]) if stage in wanted else set()
    return {stage: before for stage, before in needs.items() if stage in wanted}


def status() -> dict[str, list[object]]:
    """Changes per stage, as in `dvc status --json`; empty when everything is up to date.

    Raises InputError, or TryAgainError while a stage writes what is asked for.
    """
    found: dict[str, list[object]] = _asked("`dvc status` failed", lambda repo: repo.status())
    return found


def _asked(failed: str, question: Callable[[Any], Any]) -> Any:
    """Answer of DVC's library; `failed` begins the message of its errors as ours."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo, lock_repo

    dvc_locks.drop_dead()
    provenance.raw()  # says if a .dvc file is damaged, which is a KeyError of DVC's
    try:
        with _looking, Repo(_wait_for_lock=True) as repo, lock_repo(repo):  # dvc.lock is not being rewritten
            try:
                found = question(repo)
            except DvcException as error:
                if isinstance(error, LockError) or not dvc_locks.put_back():
                    raise
                repo._reset()
                found = question(repo)
            dvc_locks.keep()
            return found
    except LockError as error:
        check_idle()  # names what runs
        raise TryAgainError(f"{failed}: {_advised(error)}") from None
    except sqlite3.Error as error:
        raise TryAgainError(
            f"{failed}: its database cannot be written ({error}); see the room and limits of `dvc config core.site_cache_dir`,"
            " else /var/tmp/dvc"
        ) from None
    except DvcException as error:
        raise InputError(f"{failed}: {_advised(error)}") from None


def _advised(error: Exception) -> str:
    """DVC's message, with a remedy if one is known."""
    said = " ".join(str(error).split())
    if "dvc.lock" in said:
        return f"{said}; `git checkout dvc.lock`, or remove it: DVC's cache knows what has run"
    if "is not a git repository" in said:
        return f"{said}; `git init` makes it one, or `dvc config core.no_scm true` does without"
    return said


def reproduce(
    stage: str,
    env: Mapping[str, str] | None = None,
    stop_when: StopWhen | None = None,
    anew: bool = False,
    say: Say | None = None,
) -> Outcome:
    """Run `stage` alone if it is stale; the caller takes care of the stages before it.

    `anew`: run it even if DVC has its result. `say` is called with each line and each state of a progress bar that the stage
    prints; else they are passed on as they are.

    Raises:
        StageFailed: with the stage's exit code.
    """
    if not STAGE.fullmatch(stage):
        raise InputError(f"{stage!r} is no name of a stage")
    return _repro(stage, [*(["--force"] if anew else []), "--single-item", stage], env, stop_when, say)


def reproduce_all(targets: Sequence[str] = ()) -> Outcome:
    """Plain `dvc repro` (of `targets` and their dependencies): "unchanged" when it had nothing to do. Raises StageFailed."""
    return _repro("(all)", targets)


def stop_all() -> None:
    """Stop all running stages, each with its time to save, and start no more: this process is being stopped.

    A signal reaches the main thread alone; threads that wait for stages would wait on.
    """
    with _starting:
        _over.set()
        stopping = [threading.Thread(target=_stop, args=[process]) for process in _running]
    for thread in stopping:
        thread.start()
    for thread in stopping:
        thread.join()


def stopping(within_s: float) -> bool:
    """Wait at most `within_s` for `stop_all`; true if it was called."""
    return _over.wait(within_s)


def restore(stage: str) -> bool:
    """Restore the stage's outputs for the current inputs from the cache or the pool's remote; False if neither has them.

    `reproduce` then finds them and writes `dvc.lock`.
    """
    with _looking:
        return _restore(stage) or (_has_pool() and _restore(stage, config={"core": {"remote": POOL}}))


def _restore(stage: str, config: dict[str, dict[str, str]] | None = None) -> bool:
    from dvc.dependency.base import DependencyDoesNotExistError
    from dvc.repo import Repo
    from dvc.stage.cache import RunCacheNotFoundError

    with Repo(config=config, _wait_for_lock=True) as repo, repo.lock:
        (found,) = repo.stage.collect(stage)
        try:
            if config:
                repo.stage_cache.pull(None)
            found.save_deps()
            repo.stage_cache.restore(found, pull=config is not None)
        except (RunCacheNotFoundError, DependencyDoesNotExistError):
            return False
    return True


def _has_pool() -> bool:
    from dvc.config import Config

    return POOL in Config(str(Path(".dvc").resolve()))["remote"]


def fetch(target: str) -> None:
    """Pull the data of a .dvc file from the cache or the remote. Raises InputError."""
    done = _command("pull", "--quiet", target)
    if done.returncode:
        raise InputError(f"`dvc pull {target}` failed: {done.stderr.strip()[-2000:]}")


def share(folder: Path) -> None:
    """Configure the worktree at `folder` with this clone's cache and local DVC configuration."""
    from dvc.config import Config
    from dvc.repo import Repo

    mine = Config(str(Path(".dvc").resolve())).load_one("local")  # paths made absolute
    with Repo() as repo:
        mine["cache"]["dir"] = str(Path(repo.cache.local_cache_dir).resolve())
    with Config(str(folder / ".dvc")).edit("local") as config:
        config.update(mine)


def send_to_pool() -> None:
    """Push outputs and run cache to the pool's remote, if there is one. Raises TryAgainError."""
    if not _has_pool():
        return
    done = _command("push", "--quiet", "--run-cache", "--remote", POOL)
    if done.returncode:
        raise TryAgainError(f"`dvc push --run-cache --remote {POOL}` failed: {done.stderr.strip()[-2000:]}")


def bring(md5: str, folder: Path) -> None:
    """Check out the folder with DVC's `md5` (`....dir`) at `folder`, from the cache, else the remote. Raises InputError."""
    from dvc.exceptions import DvcException
    from dvc.fs import localfs
    from dvc.repo import Repo
    from dvc_data.hashfile import load
    from dvc_data.hashfile.checkout import checkout
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_objects.errors import ObjectDBError, ObjectFormatError

    wanted = HashInfo("md5", md5)
    with Repo() as repo:
        odb = repo.cache.local
        try:
            if not odb.exists(md5):
                repo.cloud.pull([wanted])
            checkout(str(folder.resolve()), localfs, load(odb, wanted), odb, force=True, quiet=True)
        except (DvcException, ObjectDBError, ObjectFormatError, OSError) as error:
            raise InputError(
                f"DVC has nothing under md5 {md5} here, in its cache or its remote ({' '.join(str(error).split())[:200]});"
                " `dvc push` where it was made, or point `dvc cache dir --local` at the cache of that folder"
            ) from None


def _command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DVC, *words], capture_output=True, text=True, env=_environment())


def _repro(
    stage: str,
    words: Sequence[str],
    env: Mapping[str, str] | None = None,
    stop_when: StopWhen | None = None,
    say: Say | None = None,
) -> Outcome:
    with _starting:
        if _over.is_set():
            raise Interrupted(f"stage {stage} is not begun: this process is being stopped")
        dvc_locks.drop_dead()
        process = subprocess.Popen(
            [*DVC, "repro", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment() | dict(env or {}),
            start_new_session=True,
            preexec_fn=end_with_parent,  # tied to the starting thread, which waits for this process
        )
        _running.add(process)
    try:
        with _watched(process, stop_when) as stopped_because:
            said = _pass_on(process, _by_lines(say) if say else sys.stdout.write)
            code = process.wait()
    except BaseException:  # Ctrl-C, a cancelled flow: no stage may keep running unseen
        _stop(process)
        raise
    finally:
        _running.discard(process)
    if stopped_because:
        raise StageFailed(stage, StageFailed.exit_code, stopped_because[0])
    if code:
        told = re.search(r"exited with (-?\d+)", said)
        if not told:
            _put_lock_back()
        raise StageFailed(stage, int(told[1]) if told else _of_dvc(code, said), said[-2000:].strip())
    if not _running:
        dvc_locks.keep()
    return "ran" if _RAN.search(said) else "restored" if _RESTORED.search(said) else "unchanged"


def _of_dvc(code: int, said: str) -> int:
    """Exit code for a fault of DVC itself, which has 251 to 255 for all: busy and full disks pass, others do not."""
    (*_, error) = re.split(r"^ERROR: ", said, flags=re.MULTILINE)  # the stage's own lines stand before it
    number = re.search(r"\[Errno (\d+)\]", error)
    full = number is not None and int(number[1]) in NO_ROOM
    passes = full or any(sign in error for sign in (_BUSY, *_NO_DATABASE))
    return code if code < 0 else TryAgainError.exit_code if passes else InputError.exit_code


def _put_lock_back() -> None:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with suppress(DvcException), _looking, Repo(_wait_for_lock=True) as repo, repo.lock:
        dvc_locks.put_back()


@contextmanager
def _watched(process: subprocess.Popen[bytes], stop_when: StopWhen | None) -> Iterator[list[str]]:
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


def _pass_on(process: subprocess.Popen[bytes], show: Callable[[str], object]) -> str:
    """Output of the process, shown as it arrives (progress bars too)."""
    assert process.stdout is not None
    said = b""
    while chunk := os.read(process.stdout.fileno(), 65536):
        show(chunk.decode("utf-8", "replace"))
        sys.stdout.flush()
        said += chunk
    return said.decode("utf-8", "replace")


def _by_lines(say: Say) -> Callable[[str], None]:
    rest = ""

    def show(text: str) -> None:
        nonlocal rest
        *lines, rest = re.split("(?<=[\r\n])", rest + text)
        for line in filter(str.strip, lines):
            say(line)

    return show


class Labelled:
    """Printer of labelled lines, for several stages at once; of a progress bar one state per `BAR_S` seconds.

    Without `verbose` these, warnings, and on `close` the last line alone.
    """

    def __init__(self, label: str, verbose: bool) -> None:
        self._label, self._verbose, self._shown, self._last = label, verbose, time.monotonic(), ""

    def __call__(self, line: str) -> None:
        bar, told = BAR.search(line), self._verbose or WARNING.search(line)
        due = time.monotonic() - self._shown > BAR_S
        if (told and line.endswith("\n")) or ((told or bar) and due):
            self._print(line)
        elif not (told or bar or TO_A_TERMINAL.search(line)):
            self._last = line

    def close(self) -> None:
        if self._last:
            self._print(self._last)

    def _print(self, line: str) -> None:
        self._shown = time.monotonic()
        sys.stdout.write(f"{self._label}: {line.strip().removeprefix(f'{self._label}: ')}\n")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop DVC and its stage: SIGTERM, so that a training can save, then SIGKILL."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            until = time.monotonic() + GRACE_S
            while time.monotonic() < until:
                process.poll()
                os.killpg(process.pid, 0)  # raises once the whole group is gone
                time.sleep(0.1)
        except ProcessLookupError:
            break
    dvc_locks.drop_dead()


def _environment() -> dict[str, str]:
    """Environment of DVC, with this Python first in PATH: a stage's `python` is looked up there.

    The shell is bash if available: it execs the stage, while dash stays between the two and hides DVC's death from the stage.
    """
    shell = shutil.which("bash") or os.environ.get("SHELL", "/bin/sh")
    here = os.path.dirname(sys.executable)  # noqa: PTH120  (resolving the link would leave the virtual environment)
    return {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}", "DVC_NO_ANALYTICS": "1", "SHELL": shell}
