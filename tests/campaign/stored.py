"""Damaged files of ours and of others between stages: data sets, checkpoints, images, records, journals, archives.

One file that a stage reads is cut off, changed, altered, or replaced by a pickle that would run, a link that leads outside, a
folder, or nothing; the stage then runs in a forked child. It has to end with a sentence, or well, and to run nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import resource
import runpy
import shlex
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import yaml

from tests.campaign.kills import Undisturbed
from tests.campaign.mutate import altered, damaged

STUCK_S = 600
MEMORY = 16 << 30
JSON, YAML = (".json",), (".yaml", ".lock")
# What reads the results beside the stages: words, and what they read.
COMMANDS: dict[str, list[str]] = {
    "python -m components.cli export align_ti exported --force": ["artifacts/students/align_ti"],
    "python -m components.cli try artifacts/students/align_ti --image docs/images/example.png": ["artifacts/students/align_ti"],
    "python -m components.cli samples": ["artifacts/scores", "artifacts/dataset", "artifacts/rows"],
    "python -m components.cli leaderboard": ["artifacts/scores", "artifacts/students", "reports"],
    "python -m components.cli arms": ["artifacts/scores", "reports"],
    "python -m components.cli runs": [".runs/journal", ".mlflow"],
    "python -m components.cli plan": ["dvc.lock", "dvc.yaml", ".runs/last"],
    "python -m components.cli preview": ["artifacts/dataset", "artifacts/models"],
    "python -m components.cli sync": [".runs/journal"],
}


class Planted:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {shlex.quote(str(self._mark))}",)


def stored(undisturbed: Undisturbed, seed: str, here: Path) -> tuple[str, str | None]:
    """What was done, and what was wrong."""
    import torch  # noqa: F401  (so that children need not)
    import transformers  # noqa: F401

    rng = random.Random(seed)
    shutil.copytree(undisturbed.clone, here, symlinks=True, ignore=shutil.ignore_patterns("cache"))
    readers = _readers(here)
    command = rng.choice(sorted(readers))
    folder = here / rng.choice(readers[command])
    files = sorted(path for path in (folder.rglob("*") if folder.is_dir() else [folder]) if path.is_file())
    if not files:
        return f"{command}: nothing to damage in {folder.name}", None
    file, mark = rng.choice(files), here.with_suffix(".mark")
    how = _damage(file, mark, rng)
    did = f"{command} after {file.relative_to(here)} was {how}"
    before = set(here.parent.iterdir())
    code, said = child(shlex.split(command)[1:], here)
    if mark.exists():
        return did, "what was planted ran"
    if code == "stuck":
        return did, f"not done in {STUCK_S} s"
    if code not in ("0", "2", "75") or "Traceback" in said:
        return did, f"exit code {code}: {' '.join(said.split())[-700:]}"
    stray = set(here.parent.iterdir()) - before - {here.with_suffix(".said")}
    return did, f"wrote outside its folder: {sorted(map(str, stray))}" if stray else None


def _readers(here: Path) -> dict[str, list[str]]:
    """What is run -> the files and folders that it reads."""
    locked = yaml.safe_load((here / "dvc.lock").read_text())["stages"].values()
    found = {stage["cmd"]: [dep["path"] for dep in stage["deps"]] for stage in locked}
    read = {
        command: [path for path in paths if not path.startswith(("components", "flows"))] for command, paths in found.items()
    }
    return {command: paths for command, paths in {**read, **COMMANDS}.items() if paths}


def _damage(file: Path, mark: Path, rng: random.Random) -> str:
    content = file.read_bytes()
    how = rng.choice(["altered"] * 4 + ["damaged"] * 4 + ["replaced by a pickle", "a link", "a folder", "removed", "noise"])
    if how == "altered" and (changed := _altered(file, content, rng)) is not None:
        file.write_bytes(changed)
        return how
    if how in ("altered", "damaged"):
        file.write_bytes(damaged(content, rng))
        return "damaged"
    file.unlink()
    if how == "replaced by a pickle":
        file.write_bytes(_pickle(mark, rng))
    elif how == "a link":
        file.symlink_to(rng.choice(["/etc/passwd", "/", file.name, "nowhere"]))
    elif how == "a folder":
        file.mkdir()
    elif how == "noise":
        file.write_bytes(rng.randbytes(200_000))
    return how


def _altered(file: Path, content: bytes, rng: random.Random) -> bytes | None:
    """Of what has a structure: another value somewhere."""
    try:
        if file.suffix in JSON:
            return json.dumps(altered(json.loads(content), rng)).encode()
        if file.suffix in YAML:
            return yaml.safe_dump(altered(yaml.safe_load(content), rng)).encode("utf-8", "replace")
        if file.suffix == ".safetensors":  # its header
            size = int.from_bytes(content[:8], "little")
            header = json.dumps(altered(json.loads(content[8 : 8 + size]), rng)).encode()
            return len(header).to_bytes(8, "little") + header + content[8 + size :]
    except (ValueError, IndexError):
        return None
    return None


def _pickle(mark: Path, rng: random.Random) -> bytes:
    """Bare, or as torch packs it."""
    plain = pickle.dumps(Planted(mark), protocol=2)
    if rng.random() < 0.5:
        return plain
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", plain)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def child(words: list[str], here: Path) -> tuple[str, str]:
    """Exit code (or signal) and what was said by `python WORDS`, without starting Python and importing torch anew."""
    said = here.with_suffix(".said")
    child = os.fork()
    if not child:
        _become(words, here, said)
    until = time.monotonic() + STUCK_S
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return str(os.waitstatus_to_exitcode(status)), said.read_text(errors="replace")
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "stuck", said.read_text(errors="replace")


def _become(words: list[str], here: Path, said: Path) -> None:
    code = 1
    with contextlib.suppress(BaseException):
        os.setsid()
        os.chdir(here)
        out = os.open(said, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.environ["ALIGNTI_TRACKING_URI"] = "journal"
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.argv = [words[1], *words[2:]]
        try:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(code)
