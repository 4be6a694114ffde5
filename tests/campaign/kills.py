"""Kills at random moments of the recipe `smoke`: the same command afterwards has to end with the same bytes.

A clone with its data is made once, and run once, undisturbed, for the bytes and for how long each stage takes. Each try copies
it, forgets what some stages made, disturbs a run that makes them again, and checks what is left: no process, no draft, nothing
to do for `dvc status`. So tries are spread over stages, not over time, and cost a stage or two each.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from components.config import recipes

ROOT = Path(__file__).parents[2]
DVC = [sys.executable, "-m", "dvc"]
COMMANDS = {
    "dvc repro": [*DVC, "repro"],
    "make repro": [sys.executable, "-m", "flows.parallel", "--jobs", "2"],
    "flow": [sys.executable, "-m", "flows.pipeline", "--parallel", "2"],
}
WEIGHTS = [2, 2, 1]  # of the commands: a flow starts a server first
START_S = 20  # at most, before a first stage begins
WRITES = {
    "dvc.lock": ["dvc.lock"],
    "DVC's cache": [".dvc/cache/files/md5/*/*"],
    "a draft": ["artifacts/*/.*", "artifacts/*/*/.*", ".runs/.*", ".runs/*/.*"],
    "a checkpoint or shard": [".runs/*/*", ".runs/distill/*/*/*", ".runs/distill/*/*/.*"],
}
VICTIMS = {"stage": "components.", "DVC": "dvc", "flow": "flows.", "sender": "mlflow_sync"}
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
STOPPED_S = 10
PATIENCE_S = 900
ENDING_S = 120
RESULTS = ("*.safetensors", "losses.jsonl", "scores.json", "predictions.jsonl", "*.arrow", "layer.json")


@dataclass(frozen=True)
class Undisturbed:
    """A clone in which everything was made; `seconds` for each stage."""

    clone: Path
    hashes: dict[str, str]
    seconds: dict[str, float]

    @classmethod
    def made(cls, folder: Path) -> Undisturbed:
        clone = folder / "clone"
        run(["git", "clone", "--quiet", "--shared", str(ROOT), str(clone)], ROOT)
        run([*DVC, "pull", "--quiet", "data.dvc"], clone)
        recipes.use("smoke", clone)
        seconds = {}
        for stage in done([*DVC, "stage", "list", "--name-only"], clone).stdout.split():
            began = time.monotonic()
            run([*DVC, "repro", stage], clone)
            seconds[stage] = time.monotonic() - began
        return cls(clone, hashes(clone), seconds)

    def without(self, stages: Sequence[str], here: Path) -> None:
        """A copy in which these have not run, and DVC's cache has the raw data alone."""
        shutil.copytree(self.clone, here, symlinks=True)
        shutil.rmtree(here / ".dvc/cache")
        run([*DVC, "fetch", "--quiet", "data.dvc"], here)
        shutil.rmtree(here / ".runs")
        lock = here / "dvc.lock"
        known = yaml.safe_load(lock.read_text())
        for stage in stages:
            for out in known["stages"].pop(stage)["outs"]:
                path = here / out["path"]
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        lock.write_text(yaml.safe_dump(known, sort_keys=False))


def hashes(here: Path) -> dict[str, str]:
    files = sorted({path for pattern in RESULTS for path in (here / "artifacts").rglob(pattern) if path.is_file()})
    return {str(path.relative_to(here)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill(undisturbed: Undisturbed, seed: str, here: Path) -> tuple[str, str | None]:
    """What was done, and what was wrong afterwards."""
    rng = random.Random(seed)
    (command,), number = rng.choices(list(COMMANDS), WEIGHTS), rng.choice(list(SIGNALS))
    victim, stages = rng.choice([*VICTIMS, "all"]), some_stages(undisturbed, rng)
    undisturbed.without(stages, here)
    process = start(COMMANDS[command], here)
    when = wait(process, sum(undisturbed.seconds[stage] for stage in stages), here, rng)
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
    did = f"{command} of {' and '.join(stages)}: SIG{number} to {len(hit)} of {victim} {when}, exit code {process.returncode}"
    return did, wrong(undisturbed, COMMANDS[command], here)


def some_stages(undisturbed: Undisturbed, rng: random.Random) -> list[str]:
    return rng.sample(list(undisturbed.seconds), rng.choice([1, 1, 2]))


def wait(process: subprocess.Popen[Any], seconds: float, here: Path, rng: random.Random) -> str:
    """Until a moment of those that the stages take, or one at which something is being written; says when that was."""
    if rng.random() < 0.5:
        moment = rng.uniform(0, START_S + seconds)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        return f"after {moment:.1f} s"
    what = rng.choice(list(WRITES))
    before, count = _written(here, what), rng.choice([1, 1, 2, 5])
    while process.poll() is None and count:
        if (now := _written(here, what)) != before:
            before, count = now, count - 1
        time.sleep(0.003)
    return f"at a write of {what}"


def _written(here: Path, what: str) -> set[tuple[str, int]]:
    found = set()
    for pattern in WRITES[what]:
        with contextlib.suppress(OSError):  # a folder goes while it is listed
            for path in here.glob(pattern):
                with contextlib.suppress(OSError):
                    found.add((str(path), path.stat().st_mtime_ns))
    return found


def wrong(undisturbed: Undisturbed, command: list[str], here: Path, environment: Mapping[str, str] = {}) -> str | None:
    """Of a run that was disturbed: run it again and look at what is there."""
    left = processes_in(here)
    if left:
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        return f"left running: {[' '.join(one.cmdline()[:4]) for one in left if one.is_running()]}"
    again = done(command, here, environment)
    if again.returncode:
        return f"the same command again exits with {again.returncode}: {(again.stdout + again.stderr)[-600:]}"
    if different := {path for path, value in hashes(here).items() if undisturbed.hashes.get(path) != value}:
        return f"other bytes: {sorted(different)}"
    if missing := undisturbed.hashes.keys() - hashes(here).keys():
        return f"missing: {sorted(missing)}"
    status = done([*DVC, "status", "--json"], here)
    if status.stdout.strip() != "{}":
        return f"dvc status: {status.stdout}{status.stderr[-300:]}"
    processes_in(here)
    drafts = [path for path in (here / "artifacts").rglob("*") if path.name.startswith(".") and path.name != ".gitignore"]
    drafts += [path for path in here.rglob("*.tmp") if ".dvc" not in path.parts]
    return f"drafts are left: {sorted(str(path.relative_to(here)) for path in drafts)[:5]}" if drafts else None


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


def processes_in(here: Path, within_s: float = ENDING_S) -> list[psutil.Process]:
    """Those that work in this folder after the time that they have to end."""
    until = time.monotonic() + within_s
    while True:
        left = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if Path(one.cwd()).is_relative_to(here) and one.status() != psutil.STATUS_ZOMBIE:
                    left.append(one)
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.5)


def start(
    command: list[str], here: Path, said: Path = Path(os.devnull), before: Callable[[], None] | None = None
) -> subprocess.Popen[bytes]:
    with said.open("wb") as file:
        return subprocess.Popen(
            command, cwd=here, env=_environment(), stdout=file, stderr=file, start_new_session=True, preexec_fn=before
        )


def run(command: list[str], here: Path) -> None:
    ran = done(command, here)
    assert ran.returncode == 0, f"{command} in {here}: {(ran.stdout + ran.stderr)[-2000:]}"


def done(command: list[str], here: Path, environment: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=here, env=_environment() | environment, capture_output=True, text=True, timeout=PATIENCE_S
    )


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    patient = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600"}  # load is no fault
    return {**os.environ, **patient, "PATH": path, "PYTHONPATH": ""}
