"""Workspace of a flow run: a git worktree of the committed code and params, over the shared cache.

So a run of a recipe or a study leaves files that you are editing as they are, two runs do not wait for each other's locks, and
outputs of one are restored in all others. Journals, checkpoints and the local MLflow store stay in the main folder. The run's
`params/` and `dvc.lock` are committed to a branch `runs/NAME`. Machines without a shared cache exchange outputs through a DVC
remote called `pool`, if this clone has one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from components.errors import NO_ROOM, InputError, TryAgainError
from components.process import is_free, locked
from components.records.paths import RUNS, WORKSPACES
from components.tracking import provenance
from flows import dvc

SHARED = (RUNS, Path(".mlflow"))
GIT = ["git", "-c", f"core.hooksPath={os.devnull}"]  # no hooks, as that of `dvc install`: it checks out, without a cache yet
AUTHOR = ["-c", "user.name=alignti", "-c", "user.email=alignti@localhost"]  # git may have no user configured


@contextmanager
def workspace(name: str, commit: str = "HEAD") -> Iterator[Path]:
    """Change into a new worktree of `commit` during the block.

    Raises InputError outside a git repository, or if this clone has no such commit and cannot fetch it either.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"{name!r} cannot name a folder and a branch: letters, digits, `.`, `_` and `-`")
    main = Path.cwd()
    folder = (WORKSPACES / name).resolve()
    for shared in SHARED:
        shared.mkdir(exist_ok=True)
    WORKSPACES.mkdir(exist_ok=True)
    sweep()
    with locked(WORKSPACES / f"{name}.lock"):  # held for the run's life: `sweep` removes those that are free
        _git("worktree", "add", "--quiet", "-B", f"runs/{name}", str(folder), _resolve_commit(commit))
        try:
            for shared in SHARED:
                (folder / shared).symlink_to(shared.resolve())
            dvc.share(folder)
            os.chdir(folder)
            for data in Path().glob("[!.]*.dvc"):
                dvc.fetch(str(data))
            yield folder
            dvc.push_to_pool()
        finally:
            os.chdir(folder)
            try:
                _commit_results(name)
            finally:
                os.chdir(main)
                _remove(name)


def head() -> str:
    """Commit of this folder's HEAD."""
    return _git("rev-parse", "HEAD")


def _resolve_commit(commit: str) -> str:
    """Full hash of `commit`, fetched if this clone does not have it."""
    if not provenance.has_commit(commit):
        _git("fetch", "--quiet", "--all")
    return _git("rev-parse", "--verify", f"{commit}^{{commit}}")


def dead_workspaces() -> list[str]:
    """Names of the worktrees whose runs died; their finished stages are in the cache."""
    return [lock.stem for lock in sorted(WORKSPACES.glob("*.lock")) if is_free(lock)]


def sweep() -> None:
    """Remove the worktrees of runs that died."""
    for name in dead_workspaces():
        with suppress(TryAgainError), locked(WORKSPACES / f"{name}.lock", "another run removes it"):
            _remove(name)


def prune(days: float) -> list[str]:
    """Delete the branches of runs that ended at least `days` ago; returns their names. Their outputs stay in DVC's cache."""
    listed = _git("for-each-ref", "--format=%(refname:short) %(committerdate:unix)", "refs/heads/runs/").splitlines()
    dated_branches = [line.rsplit(" ", 1) for line in listed]
    old = [branch for branch, timestamp in dated_branches if int(timestamp) <= time.time() - days * 86400]
    ended = [branch for branch in old if not (WORKSPACES / branch.removeprefix("runs/")).exists()]
    if ended:
        _git("branch", "--quiet", "-D", *ended)
    return ended


def _commit_results(name: str) -> None:
    """Commit the run's `params/` and `dvc.lock` to its branch."""
    with suppress(FileNotFoundError):
        _git("add", "params", *(["dvc.lock"] if Path("dvc.lock").exists() else []))
        if _git("status", "--porcelain", "--untracked-files=no"):
            _git(*AUTHOR, "commit", "--quiet", "--no-gpg-sign", "-m", f"Run {name}: its params and what DVC made of them")


def _remove(name: str) -> None:
    folder = WORKSPACES / name
    if folder.exists():
        _git("worktree", "remove", "--force", str(folder))
    (WORKSPACES / f"{name}.lock").unlink(missing_ok=True)


def _git(*args: str) -> str:
    if shutil.which("git") is None:
        raise InputError("a workspace of its own is a worktree of git, and there is no git here")
    result = subprocess.run([*GIT, *args], capture_output=True, text=True)
    if result.returncode:
        no_room = any(os.strerror(number) in result.stderr for number in NO_ROOM)
        message = f"`git {args[0]}` failed in {Path.cwd()}: {result.stderr.strip()[-500:]}"
        raise (TryAgainError if no_room else InputError)(message)
    return result.stdout.strip()
