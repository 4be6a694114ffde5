"""A folder of a flow run's own: the committed code and params in a git worktree, over the cache that all share.

So a run on a recipe or a study changes nothing that you are editing, two runs do not wait for each other's locks, and what was
made in one is restored, not made again, in all others. Journals, checkpoints and the local MLflow store stay in the main
folder. What ran, its `params/` and `dvc.lock`, is left on a branch `runs/NAME`.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from components.artifacts import RUNS
from components.errors import InputError
from flows import dvc

FOLDERS = RUNS / "workspaces"
SHARED = (RUNS, Path(".mlflow"))
AUTHOR = ["-c", "user.name=alignti", "-c", "user.email=alignti@localhost"]  # a machine may have nobody's name


@contextmanager
def workspace(name: str, commit: str = "HEAD") -> Iterator[Path]:
    """Go into a new worktree of `commit` for the time of the block. Raises InputError outside a git repository."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"{name!r} cannot name a folder and a branch: letters, digits, `.`, `_` and `-`")
    main = Path.cwd()
    folder = (FOLDERS / name).resolve()
    for shared in SHARED:
        shared.mkdir(exist_ok=True)
    FOLDERS.mkdir(exist_ok=True)
    sweep()
    with (FOLDERS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held while this run lives: how `sweep` knows that it does
        _git("worktree", "add", "--quiet", "-B", f"runs/{name}", str(folder), commit)
        try:
            for shared in SHARED:
                (folder / shared).symlink_to(shared.resolve())
            dvc.share_cache(folder, dvc.cache())
            os.chdir(folder)
            for data in Path().glob("[!.]*.dvc"):
                dvc.fetch(str(data))
            yield folder
        finally:
            os.chdir(folder)
            _keep(name)
            os.chdir(main)
            _remove(name)


def sweep() -> list[str]:
    """Remove the worktrees of runs that died; what they had finished is in the cache. Returns their names."""
    dead = []
    for lock in FOLDERS.glob("*.lock"):
        with lock.open() as file, suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock.stem)
            dead.append(lock.stem)
    return dead


def _keep(name: str) -> None:
    """Commit what the run was asked and what came of it to its branch."""
    with suppress(FileNotFoundError):
        _git("add", "params", *(["dvc.lock"] if Path("dvc.lock").exists() else []))
        if _git("status", "--porcelain", "--untracked-files=no"):
            _git(*AUTHOR, "commit", "--quiet", "--no-verify", "-m", f"Run {name}: its params and what DVC made of them")


def _remove(name: str) -> None:
    folder = FOLDERS / name
    if folder.exists():
        _git("worktree", "remove", "--force", str(folder))
    (FOLDERS / f"{name}.lock").unlink(missing_ok=True)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"`git {words[0]}` failed in {Path.cwd()}: {done.stderr.strip()[-500:]}")
    return done.stdout.strip()
