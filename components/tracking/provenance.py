"""Provenance of results: md5 of a stage's inputs and outputs, and the run that made them.

`dvc.yaml` declares them. `dvc.lock` and the `.dvc` files hold the md5 of inputs. DVC hashes outputs only after the stage has
ended, so they are hashed here by the same rule. `.runs/made/MD5` names the run that made those bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.errors import DataError, TryAgainError
from components.io import fingerprint, write_text
from components.records.paths import RUNS

MADE = RUNS / "made"
LOCK = Path("dvc.lock")
DVC_LOCK = Path(".dvc/tmp/lock")  # DVC's lock while it writes
PATIENCE_S, STILL_S = 10.0, 2.0
CODE = ("components", "dvc.yaml", "data.dvc", ".dvc/config")  # code and data that decide a stage's result, params aside


@dataclass(frozen=True)
class Declaration:
    """Stage as declared in `dvc.yaml`, its arm filled in."""

    command: str
    deps: list[str]
    params: dict[str, list[str] | None]  # file -> the keys read, None for all
    outs: list[str]  # metrics and plots among them

    @classmethod
    def read(cls, stage: str) -> Declaration | None:
        """The stage's declaration; None without `dvc.yaml`, or if it has no such stage."""
        try:
            stages = _yaml(Path("dvc.yaml"))["stages"]
        except FileNotFoundError:
            return None
        name, _, arm = stage.partition("@")
        if name not in stages or ("foreach" in stages[name]) != bool(arm):
            return None
        body = json.loads(json.dumps(stages[name].get("do", stages[name])).replace("${key}", arm).replace("${item}", arm))
        return cls(
            command=body["cmd"],
            deps=body.get("deps", []),
            params={file: keys for entry in body.get("params", []) for file, keys in _params(entry)},
            outs=[path for kind in ("outs", "metrics", "plots") for path in map(_path, body.get(kind, []))],
        )

    def inputs(self) -> dict[str, str]:
        """Path -> md5 of each dependency that an earlier stage made, or that a .dvc file names."""
        md5s = digests()
        return {dep: md5s[dep] for dep in self.deps if dep in md5s}

    def fingerprint(self) -> str:
        """16 hex digits over the command, the params, the inputs and the code: equal means equal results."""
        code = {dep: digest(Path(dep)).md5 for dep in self.deps if dep.startswith("components")}
        values = {file: _select(_yaml(Path(file)), keys) for file, keys in self.params.items()}
        return fingerprint({"command": self.command, "inputs": self.inputs(), "deps": code, "params": values}, [])


@dataclass(frozen=True)
class Digest:
    """DVC's md5 of a file, or (ending in `.dir`) of a folder, with those of its files."""

    md5: str
    files: dict[str, str]  # relative path -> md5; "." for a single file


def digest(path: Path) -> Digest:
    """Digest of a file or folder by DVC's rule. Raises FileNotFoundError."""
    if not path.is_dir():
        md5 = _md5(path)
        return Digest(md5, {".": md5})
    paths = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    files = {file.relative_to(path).as_posix(): _md5(file) for file in paths}
    listing = json.dumps([{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())], sort_keys=True)
    return Digest(hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() + ".dir", files)


def locked() -> dict[str, dict[str, str]]:
    """Stage -> path -> md5 of its outputs in `dvc.lock`; empty before the first stage."""
    return {stage: {out["path"]: out["md5"] for out in entry.get("outs", [])} for stage, entry in lock_file().items()}


def read_by(stage: str) -> dict[str, str]:
    """Path -> md5 of the stage's dependencies in `dvc.lock`; empty if it has not run."""
    return {dep["path"]: dep["md5"] for dep in lock_file().get(stage, {}).get("deps", [])}


def of_other_params(stages: Iterable[str]) -> set[str]:
    """Those of `stages` whose params in `dvc.lock`, or an upstream stage's, differ from `params/`."""
    entries = lock_file()
    producers = {Path(out["path"]): name for name, entry in entries.items() for out in entry.get("outs", [])}
    now = {file: _yaml(Path(file)) for entry in entries.values() for file in entry.get("params", {}) if Path(file).is_file()}
    differing = {
        name
        for name, entry in entries.items()
        if any(_select(now.get(file), list(values)) != values for file, values in entry.get("params", {}).items())
    }

    def upstream(stage: str) -> set[str]:
        paths = [Path(dep["path"]) for dep in entries.get(stage, {}).get("deps", [])]
        direct = {producers[path] for dep in paths for path in (dep, *dep.parents) if path in producers}
        return {stage}.union(*map(upstream, direct))

    return {stage for stage in stages if upstream(stage) & differing}


def lock_file() -> dict[str, Any]:
    """Stages of `dvc.lock`; none before the first has ended.

    DVC truncates and rewrites the file under its own lock when a stage ends, which may be at any time, so the lock is shared
    while reading. Raises TryAgainError if the file is unreadable even so.
    """
    if not LOCK.exists():
        return {}
    with _shared_dvc_lock():
        try:
            stages: dict[str, Any] = _yaml(LOCK)["stages"]
        except (yaml.YAMLError, TypeError, KeyError):
            raise TryAgainError("dvc.lock is being written, or is broken: `git checkout dvc.lock`, or remove it") from None
    return stages


@contextmanager
def _shared_dvc_lock() -> Iterator[None]:
    """Shared hold of DVC's lock in this folder, so that no process rewrites `dvc.lock`.

    A lock held for longer than PATIENCE_S is that of a download, which leaves the file alone, or of a rewrite, which takes 10 s
    at 200 stages: the block is then entered once the file has not changed for STILL_S.
    """
    if not DVC_LOCK.exists():
        yield
        return
    with DVC_LOCK.open() as lock:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                state = LOCK.stat()  # empty, then growing, while DVC rewrites it
                if time.monotonic() > deadline and state.st_size and time.time() - state.st_mtime > STILL_S:
                    break
                time.sleep(0.05)
        yield


def raw() -> dict[str, str]:
    """Path -> md5 of the raw data in the .dvc files here. Raises DataError if one is damaged."""
    md5s: dict[str, str] = {}
    for file in Path().glob("[!.]*.dvc"):
        try:
            md5s |= {str(file.parent / out["path"]): out["md5"] for out in _yaml(file)["outs"] if "md5" in out}
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
            raise DataError(f"{file} is damaged; `git checkout {file}` brings it back") from None
    return md5s


def digests() -> dict[str, str]:
    """Path -> DVC's md5 of stage outputs and raw data."""
    return {path: md5 for outs in locked().values() for path, md5 in outs.items()} | raw()


def params() -> dict[str, str]:
    """Text of every params file but runtime.yaml, which affects no result."""
    return {
        str(file): file.read_text(encoding="utf-8") for file in sorted(Path("params").glob("*.yaml")) if file.stem != "runtime"
    }


def note_maker(md5: str, run: str) -> None:
    """Record the journal id of the run that made these bytes; the first of several is kept."""
    if not (MADE / md5).exists():
        write_text(MADE / md5, run + "\n")


def maker(md5: str) -> str | None:
    """Journal of the run that made these bytes here, through whichever stage, cache or workspace they have passed since."""
    try:
        return (MADE / md5).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def uncommitted() -> list[str]:
    """Modified and untracked files of `CODE`; none outside a git repository."""
    output = git("status", "--porcelain", "--untracked-files=all", "--", *CODE) or ""
    return [line.split(maxsplit=1)[1] for line in output.splitlines()]


def commit_tags() -> dict[str, str]:
    """Tags of a run: commit, whether tracked files differed from it, and DVC's names of stage and experiment."""
    tags = {key: os.environ[key] for key in ("DVC_STAGE", "DVC_EXP_NAME") if key in os.environ}
    commit = git("rev-parse", "HEAD")
    if commit is not None:
        tags["git.dirty"] = str(git("status", "--porcelain", "--untracked-files=no") != "").lower()
    return tags | {"mlflow.source.git.commit": commit or "none"}  # none: an export without its history


def git(*args: str) -> str | None:
    """Output of git; None if it fails, as outside a repository, or is not installed."""
    try:
        return subprocess.run(["git", *args], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def warn_without_commit() -> None:
    """Say so if git does not read this repository (of another owner, as in a container): runs then have no commit."""
    if Path(".git").exists() and shutil.which("git") is not None:
        done = subprocess.run(["git", "rev-parse", "--git-dir"], capture_output=True, text=True)
        if done.returncode:
            print(f"this run is recorded without its commit, as git says: {' '.join(done.stderr.split())}", file=sys.stderr)


def has_commit(commit: str) -> bool:
    """Whether this clone has the commit."""
    return git("cat-file", "-e", f"{commit}^{{commit}}") is not None


def _path(out: str | dict[str, Any]) -> str:
    return out if isinstance(out, str) else next(iter(out))


def _params(entry: str | dict[str, list[str] | None]) -> Iterator[tuple[str, list[str] | None]]:
    """(file, keys) of a `params` entry; `params/a.yaml:` with nothing below it means the whole file."""
    if isinstance(entry, str):
        yield "params.yaml", [entry]
    else:
        yield from entry.items()


def _select(values: Any, keys: list[str] | None) -> Any:
    if keys is None:
        return values
    selected = {}
    for key in keys:
        value = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        selected[key] = value
    return selected


def _md5(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml's takes a tenth of the time
    """Loader that takes DVC's 2e-05 for a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _yaml(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), _Loader)
