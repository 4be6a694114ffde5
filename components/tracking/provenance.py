"""Provenance of results: bytes that a stage reads and makes, and the run that made them.

`dvc.yaml` names them. `dvc.lock` and the `.dvc` files hold the md5 of what is read. DVC hashes what a stage made only after it
has ended, so that is computed here, in the same way. `.runs/made/MD5` names the run that made those bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.errors import TryAgainError
from components.io import write_text
from components.records.paths import RUNS

MADE = RUNS / "made"
LOCK = Path("dvc.lock")
DVC_LOCK = Path(".dvc/tmp/lock")  # what a DVC process holds while it writes
CODE = ("components", "dvc.yaml", "data.dvc", ".dvc/config")  # code and data that decide a stage's result, params aside


@dataclass(frozen=True)
class Declared:
    """A stage as `dvc.yaml` has it, its arm filled in."""

    stage: str
    command: str
    deps: list[str]
    params: dict[str, list[str] | None]  # file -> the keys read, None for all
    outs: list[str]  # metrics and plots among them

    @classmethod
    def read(cls, stage: str) -> Declared | None:
        """None if `dvc.yaml` has no such stage, or there is none."""
        try:
            stages = _yaml(Path("dvc.yaml"))["stages"]
        except FileNotFoundError:
            return None
        name, _, arm = stage.partition("@")
        if name not in stages or ("foreach" in stages[name]) != bool(arm):
            return None
        body = json.loads(json.dumps(stages[name].get("do", stages[name])).replace("${key}", arm).replace("${item}", arm))
        return cls(
            stage=stage,
            command=body["cmd"],
            deps=body.get("deps", []),
            params={file: keys for entry in body.get("params", []) for file, keys in _params(entry)},
            outs=[path for kind in ("outs", "metrics", "plots") for path in map(_path, body.get(kind, []))],
        )

    def inputs(self) -> dict[str, str]:
        """Path -> md5 of each dependency that a stage before this one made, or that a .dvc file names."""
        known = digests()
        return {dep: known[dep] for dep in self.deps if dep in known}

    def fingerprint(self) -> str:
        """16 hex digits over the command, the params, the inputs and the code: equal means that it would make the same."""
        code = {dep: digest(Path(dep)).md5 for dep in self.deps if dep.startswith("components")}
        values = {file: _chosen(_yaml(Path(file)), keys) for file, keys in self.params.items()}
        facts = json.dumps([self.command, self.inputs(), code, values], sort_keys=True, default=str)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Digest:
    """The md5 by which DVC knows a file, or (ending in `.dir`) a folder, and those of the files in it."""

    md5: str
    files: dict[str, str]  # relative path -> md5; a file has one, called "."


def digest(path: Path) -> Digest:
    """Computed as DVC does. Raises FileNotFoundError."""
    if not path.is_dir():
        found = _md5(path)
        return Digest(found, {".": found})
    inside = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    files = {file.relative_to(path).as_posix(): _md5(file) for file in inside}
    listing = json.dumps([{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())], sort_keys=True)
    return Digest(hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() + ".dir", files)


def locked() -> dict[str, dict[str, str]]:
    """Stage -> path -> md5 of what it made, as `dvc.lock` has it; empty before the first stage."""
    return {stage: {out["path"]: out["md5"] for out in entry.get("outs", [])} for stage, entry in lock_file().items()}


def read_by(stage: str) -> dict[str, str]:
    """Path -> md5 of what `dvc.lock` says that the stage read; empty if it has not run."""
    return {dep["path"]: dep["md5"] for dep in lock_file().get(stage, {}).get("deps", [])}


def of_other_params(stages: Iterable[str]) -> set[str]:
    """Those of the stages that, or whose earlier stages, `dvc.lock` noted with other values than `params/` have now."""
    noted = lock_file()
    makers = {Path(out["path"]): name for name, entry in noted.items() for out in entry.get("outs", [])}
    now = {file: _yaml(Path(file)) for entry in noted.values() for file in entry.get("params", {}) if Path(file).is_file()}
    differing = {
        name
        for name, entry in noted.items()
        if any(_chosen(now.get(file), list(values)) != values for file, values in entry.get("params", {}).items())
    }

    def needed(stage: str) -> set[str]:
        paths = [Path(dep["path"]) for dep in noted.get(stage, {}).get("deps", [])]
        before = {makers[path] for dep in paths for path in (dep, *dep.parents) if path in makers}
        return {stage}.union(*map(needed, before))

    return {stage for stage in stages if needed(stage) & differing}


def lock_file() -> dict[str, Any]:
    """Stages of `dvc.lock`; none before the first has ended.

    DVC empties and rewrites the file when a stage ends, under its own lock, so that is shared while reading: another stage may
    end at any time. A lock that is held for longer is not of a rewrite. Raises TryAgainError if it cannot be read even so.
    """
    if not LOCK.exists():
        return {}
    with _dvc_at_rest():
        try:
            stages: dict[str, Any] = _yaml(LOCK)["stages"]
        except (yaml.YAMLError, TypeError, KeyError):
            raise TryAgainError("dvc.lock is being written, or is broken: `git checkout dvc.lock`, or remove it") from None
    return stages


@contextmanager
def _dvc_at_rest(seconds: float = 10.0) -> Iterator[None]:
    """Shares DVC's lock of this folder, so that no other process rewrites `dvc.lock`; after `seconds`, goes on without it."""
    if not DVC_LOCK.exists():
        yield
        return
    with DVC_LOCK.open() as held:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield


def raw() -> dict[str, str]:
    """Path -> md5 of the raw data, as the .dvc files here have it."""
    found: dict[str, str] = {}
    for file in Path().glob("[!.]*.dvc"):
        found |= {str(file.parent / out["path"]): out["md5"] for out in _yaml(file).get("outs", [])}
    return found


def digests() -> dict[str, str]:
    """Path -> the md5 under which DVC keeps it: of what stages made, and of the raw data."""
    return {path: md5 for made in locked().values() for path, md5 in made.items()} | raw()


def params() -> dict[str, str]:
    """Text of every params file but runtime.yaml, which decides no result."""
    return {
        str(file): file.read_text(encoding="utf-8") for file in sorted(Path("params").glob("*.yaml")) if file.stem != "runtime"
    }


def note_maker(md5: str, run: str) -> None:
    """`run` is the id of a journal. Of two that made the same bytes the first is kept."""
    if not (MADE / md5).exists():
        write_text(MADE / md5, run + "\n")


def maker(md5: str) -> str | None:
    """The journal of the run that made these bytes here, whichever stage, cache or workspace they have gone through since."""
    try:
        return (MADE / md5).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def uncommitted() -> list[str]:
    """Files of `CODE` that are not as they were committed, new ones among them; none outside a git repository."""
    try:
        said = git("status", "--porcelain", "--untracked-files=all", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.split(maxsplit=1)[1] for line in said.splitlines()]


def commit_tags() -> dict[str, str]:
    """The commit that ran, whether tracked files differed from it, and DVC's name for the stage."""
    origin = {key: os.environ[key] for key in ("DVC_STAGE", "DVC_EXP_NAME") if key in os.environ}
    try:
        commit = git("rev-parse", "HEAD")
        origin["git.dirty"] = str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower()
        origin["mlflow.source.git.commit"] = commit
    except (OSError, subprocess.CalledProcessError):
        origin["mlflow.source.git.commit"] = "none"  # an export without its history
    return origin


def git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout.strip()


def _path(out: str | dict[str, Any]) -> str:
    return out if isinstance(out, str) else next(iter(out))


def _params(entry: str | dict[str, list[str] | None]) -> Iterator[tuple[str, list[str] | None]]:
    """`params/a.yaml:` with nothing below it means all of the file."""
    if isinstance(entry, str):
        yield "params.yaml", [entry]
    else:
        yield from entry.items()


def _chosen(values: Any, keys: list[str] | None) -> Any:
    if keys is None:
        return values
    chosen = {}
    for key in keys:
        found = values
        for step in key.split("."):
            found = found.get(step) if isinstance(found, dict) else None
        chosen[key] = found
    return chosen


def _md5(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _yaml(path: Path) -> Any:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is there
    return yaml.load(path.read_text(encoding="utf-8"), loader)
