"""The interface to DVC: its graph, status, caches and remotes. `dvc_repro` runs stages, `dvc_locks` mends locks.

Always `--wait-for-lock`: DVC must lock again after a stage has run, and without it gives up after 3 s, losing the result.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.errors import InputError, TryAgainError, unknown
from components.tracking import provenance
from flows import dvc_locks
from flows.jobs import check_idle

DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]
POOL = "pool"  # DVC remote for results, between machines without a shared cache

_repo_lock = threading.Lock()  # DVC's objects are not thread-safe


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
    if not needs:
        raise InputError("dvc.yaml is missing or has no stages; `git checkout dvc.yaml` brings it back")
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


def restore(stage: str) -> bool:
    """Restore the stage's outputs for the current inputs from the cache or the pool's remote; False if neither has them.

    `reproduce` then finds them and writes `dvc.lock`. Raises InputError if the remote is of a kind without a run cache.
    """
    with _repo_lock:
        return _restore(stage) or (_has_pool() and _restore(stage, config={"core": {"remote": POOL}}))


def _restore(stage: str, config: dict[str, dict[str, str]] | None = None) -> bool:
    from dvc.dependency.base import DependencyDoesNotExistError
    from dvc.repo import Repo
    from dvc.stage.cache import RunCacheNotFoundError, RunCacheNotSupported

    logging.getLogger("dvc.stage.cache").setLevel(logging.WARNING)  # `reproduce`, which follows, says the same
    with Repo(config=config, _wait_for_lock=True) as repo, repo.lock:
        (dvc_stage,) = repo.stage.collect(stage)
        try:
            if config:
                repo.stage_cache.pull(None)
            dvc_stage.save_deps()
            repo.stage_cache.restore(dvc_stage, pull=config is not None)
        except (RunCacheNotFoundError, DependencyDoesNotExistError):
            return False
        except RunCacheNotSupported as error:
            raise InputError(f"DVC remote {POOL} serves no results: {error}; give it another kind of address") from None
    return True


def _has_pool() -> bool:
    from dvc.config import Config

    return POOL in Config(str(Path(".dvc").resolve()))["remote"]


def fetch(target: str) -> None:
    """Pull the data of a .dvc file from the cache or the remote. Raises InputError."""
    result = _run_dvc("pull", target)
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
    result = _run_dvc("push", "--run-cache", "--remote", POOL)
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
    """Output of the command; with `--quiet` DVC would keep its errors to itself, too."""
    return subprocess.run([*DVC, *args], capture_output=True, text=True, env=environment())


def restore_lock_file() -> None:
    """Put back the last copy of a damaged dvc.lock, if there is one."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with suppress(DvcException), _repo_lock, Repo(_wait_for_lock=True) as repo, repo.lock:
        dvc_locks.restore_backup()


def environment() -> dict[str, str]:
    """Environment of DVC, with this Python first in PATH: a stage's `python` is looked up there, and runs the code of its
    folder, also in a workspace: with PYTHONSAFEPATH it would be the installed project's.

    The shell is bash if available: it execs the stage, while dash stays between the two and hides DVC's death from the stage.
    """
    shell = shutil.which("bash") or os.environ.get("SHELL", "/bin/sh")
    bin_dir = os.path.dirname(sys.executable)  # noqa: PTH120  (resolving the link would leave the virtual environment)
    path = f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "SHELL": shell, "PYTHONSAFEPATH": ""}
