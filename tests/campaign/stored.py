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

from tests.campaign.kills import Baseline
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


def stored(baseline: Baseline, seed: str, cwd: Path) -> tuple[str, str | None]:
    """A description of the try, and its fault or None."""
    import torch  # noqa: F401  (so that children need not)
    import transformers  # noqa: F401

    rng = random.Random(seed)
    shutil.copytree(baseline.clone, cwd, symlinks=True, ignore=shutil.ignore_patterns("cache"))
    readers = _readers(cwd)
    command = rng.choice(sorted(readers))
    folder = cwd / rng.choice(readers[command])
    files = sorted(path for path in (folder.rglob("*") if folder.is_dir() else [folder]) if path.is_file())
    if not files:
        return f"{command}: nothing to damage in {folder.name}", None
    file, mark = rng.choice(files), cwd.with_suffix(".mark")
    how = _damage(file, mark, rng)
    did = f"{command} after {file.relative_to(cwd)} was {how}"
    existing = set(cwd.parent.iterdir())
    code, output = run_forked(shlex.split(command)[1:], cwd)
    if mark.exists():
        return did, "what was planted ran"
    if code == "stuck":
        return did, f"not done in {STUCK_S} s"
    if code not in ("0", "2", "75") or "Traceback" in output:
        return did, f"exit code {code}: {' '.join(output.split())[-700:]}"
    stray = set(cwd.parent.iterdir()) - existing - {cwd.with_suffix(".said")}
    return did, f"wrote outside its folder: {sorted(map(str, stray))}" if stray else None


def _readers(cwd: Path) -> dict[str, list[str]]:
    """Command -> the files and folders that it reads."""
    locked = yaml.safe_load((cwd / "dvc.lock").read_text())["stages"].values()
    deps = {stage["cmd"]: [dep["path"] for dep in stage["deps"]] for stage in locked}
    read = {
        command: [path for path in paths if not path.startswith(("components", "flows"))] for command, paths in deps.items()
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
    """Structured content with one entry altered; None for any other file."""
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


def run_forked(args: list[str], cwd: Path) -> tuple[str, str]:
    """Exit code (or signal) and output of `python ARGS`, without starting Python and importing torch anew."""
    log = cwd.with_suffix(".said")
    pid = os.fork()
    if not pid:
        _become(args, cwd, log)
    until = time.monotonic() + STUCK_S
    while time.monotonic() < until:
        finished, status = os.waitpid(pid, os.WNOHANG)
        if finished:
            return str(os.waitstatus_to_exitcode(status)), log.read_text(errors="replace")
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "stuck", log.read_text(errors="replace")


def _become(args: list[str], cwd: Path, log: Path) -> None:
    code = 1
    with contextlib.suppress(BaseException):
        os.setsid()
        os.chdir(cwd)
        out = os.open(log, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.environ["ALIGNTI_TRACKING_URI"] = "journal"
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.argv = [args[1], *args[2:]]
        try:
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(code)
