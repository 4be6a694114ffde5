"""Kills and full disks at random moments of the recipe `smoke`: the same command afterwards has to end with the same bytes.

A clone with its data is made once, and run once, undisturbed, for the bytes and for how long it takes. Each try copies the
clone, disturbs a run of it, and checks what is left: no process, no draft, nothing to do for `dvc status`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from components.config import recipes

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "dvc repro": [sys.executable, "-m", "dvc", "repro"],
    "make repro": [sys.executable, "-m", "flows.parallel", "--jobs", "2"],
    "flow": [sys.executable, "-m", "flows.pipeline", "--parallel", "2"],
}
VICTIMS = {"stage": "components.", "DVC": "dvc", "flow": "flows.", "sender": "mlflow_sync"}
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
STOPPED_S = 10
PATIENCE_S = 900
RESULTS = ("*.safetensors", "losses.jsonl", "scores.json", "predictions.jsonl", "*.arrow", "layer.json")
MOUNT = shutil.which("mount") if os.geteuid() == 0 else None


@dataclass(frozen=True)
class Undisturbed:
    clone: Path
    hashes: dict[str, str]
    seconds: float

    @classmethod
    def made(cls, folder: Path) -> Undisturbed:
        clone, run = folder / "clone", folder / "undisturbed"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        _run([sys.executable, "-m", "dvc", "pull", "--quiet", "data.dvc"], clone)
        recipes.use("smoke", clone)
        shutil.copytree(clone, run, symlinks=True)
        began = time.monotonic()
        _run(COMMANDS["dvc repro"], run)
        found = cls(clone, hashes(run), time.monotonic() - began)
        shutil.rmtree(run)
        return found


def hashes(run: Path) -> dict[str, str]:
    files = sorted({path for pattern in RESULTS for path in (run / "artifacts").rglob(pattern) if path.is_file()})
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill(undisturbed: Undisturbed, seed: str, here: Path) -> tuple[str, str | None]:
    """What was done, and what was wrong afterwards."""
    rng = random.Random(seed)
    command, number = rng.choice(list(COMMANDS)), rng.choice(list(SIGNALS))
    victim, moment = rng.choice([*VICTIMS, "all"]), rng.uniform(0, undisturbed.seconds)
    shutil.copytree(undisturbed.clone, here, symlinks=True)
    process = _start(COMMANDS[command], here)
    time.sleep(moment)
    hit = _victims(process, victim, rng)
    for one in hit:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(SIGNALS[number])
    if number == "STOP":
        time.sleep(STOPPED_S)
        for one in hit:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGCONT)
    process.wait(PATIENCE_S)
    did = f"{command}: SIG{number} to {victim} ({len(hit)} process(es)) after {moment:.1f} s, exit code {process.returncode}"
    return did, _wrong(undisturbed, COMMANDS[command], here)


def full_disk(undisturbed: Undisturbed, seed: str, here: Path) -> tuple[str, str | None]:
    """On a file system that has less room than it takes; then with room."""
    rng = random.Random(seed)
    here.mkdir()
    with _small(here, 4096) as grow:
        run = here / "run"
        shutil.copytree(undisturbed.clone, run, symlinks=True)
        used = (shutil.disk_usage(here).used >> 20) + 1
        room = rng.choice([1, 2, 4, 8, 12, 16, 24, 32])
        grow(used + room)
        command = rng.choice(["dvc repro", "make repro"])
        done = _done(COMMANDS[command], run)
        did = f"{command} with {room} MiB of room, exit code {done.returncode}"
        if done.returncode and "Traceback" in (said := done.stdout + done.stderr):
            return did, f"a traceback: {said[said.index('Traceback') :][:600]}"
        grow(4096)
        return did, _wrong(undisturbed, COMMANDS[command], run)


def _wrong(undisturbed: Undisturbed, command: list[str], run: Path) -> str | None:
    """Of a run that was disturbed: run it again and look at what is there."""
    left = _left(run, 60)
    if left:
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        return f"left running: {[' '.join(one.cmdline()[:4]) for one in left if one.is_running()]}"
    done = _done(command, run)
    said = done.stdout + done.stderr
    if done.returncode:
        return f"the same command again exits with {done.returncode}: {said[-600:]}"
    if different := {path for path, value in hashes(run).items() if undisturbed.hashes.get(path) != value}:
        return f"other bytes: {sorted(different)}"
    if missing := undisturbed.hashes.keys() - hashes(run).keys():
        return f"missing: {sorted(missing)}"
    status = _done([sys.executable, "-m", "dvc", "status", "--json"], run)
    if status.stdout.strip() != "{}":
        return f"dvc status: {status.stdout}{status.stderr[-300:]}"
    _left(run, 60)
    drafts = [path for path in (run / "artifacts").rglob("*") if path.name.startswith(".") and path.name != ".gitignore"]
    drafts += [path for path in run.rglob("*.tmp") if ".dvc" not in path.parts]
    return f"drafts are left: {sorted(str(path.relative_to(run)) for path in drafts)[:5]}" if drafts else None


def _victims(process: subprocess.Popen[bytes], victim: str, rng: random.Random) -> list[psutil.Process]:
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    if victim == "all":
        return family
    named = []
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if VICTIMS[victim] in " ".join(one.cmdline()[1:4]):
                named.append(one)
    return [rng.choice(named)] if named else []


def _left(run: Path, within_s: float) -> list[psutil.Process]:
    """Processes that work in this folder, after so long."""
    until = time.monotonic() + within_s
    while True:
        left = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if Path(one.cwd()).is_relative_to(run) and one.status() != psutil.STATUS_ZOMBIE:
                    left.append(one)
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.5)


@contextlib.contextmanager
def _small(folder: Path, mib: int) -> Iterator[object]:
    assert MOUNT, "only root may mount a small file system"
    subprocess.run([MOUNT, "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield lambda size: subprocess.run([MOUNT, "-o", f"remount,size={size}m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _start(command: list[str], run: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, cwd=run, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _run(command: list[str], run: Path) -> None:
    done = _done(command, run)
    assert done.returncode == 0, f"{command} in {run}: {(done.stdout + done.stderr)[-2000:]}"


def _done(command: list[str], run: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=run, env=_environment(), capture_output=True, text=True, timeout=PATIENCE_S)


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}
