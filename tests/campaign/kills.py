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
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from components.config import recipes
from flows.dvc_locks import is_whole

ROOT = Path(__file__).parents[2]
DVC = [sys.executable, "-m", "dvc"]
COMMANDS = {
    "dvc repro": [*DVC, "repro"],
    "make repro": [sys.executable, "-m", "flows.parallel", "--jobs", "2"],
    "flow": [sys.executable, "-m", "flows.pipeline", "--parallel", "2"],
}
WEIGHTS = [2, 2, 1]  # of the commands: a flow starts a server first
START_S = 10  # before a first stage begins
WRITES = {
    "dvc.lock": ["dvc.lock"],
    "DVC's cache": [".dvc/cache/files/md5/*/*"],
    "a draft": ["artifacts/*/.*", "artifacts/*/*/.*", ".runs/.*", ".runs/*/.*"],
    "a checkpoint or shard": [".runs/*/*", ".runs/distill/*/*/*", ".runs/distill/*/*/.*"],
}
VICTIMS = {"stage": r"components\.(?!tracking)", "DVC": "dvc", "flow": r"flows\.", "sender": "mlflow_sync"}
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
MOST_KILLS = 5  # of one command
STOPPED_S = 10
PATIENCE_S = 900
ENDING_S = 120
RESULTS = ("*.safetensors", "losses.jsonl", "scores.json", "predictions.jsonl", "*.arrow", "layer.json")


@dataclass(frozen=True)
class Baseline:
    """A clone in which every stage ran undisturbed; `seconds` of each stage."""

    clone: Path
    hashes: dict[str, str]
    seconds: dict[str, float]

    @classmethod
    def build(cls, folder: Path) -> Baseline:
        clone = folder / "clone"
        run(["git", "clone", "--quiet", "--shared", str(ROOT), str(clone)], ROOT)
        run([*DVC, "pull", "--quiet", "data.dvc"], clone)
        recipes.use("smoke", clone)
        seconds = {}
        for stage in execute([*DVC, "stage", "list", "--name-only"], clone).stdout.split():
            began = time.monotonic()
            run([*DVC, "repro", stage], clone)
            seconds[stage] = time.monotonic() - began
        return cls(clone, hashes(clone), seconds)

    def copy_without(self, stages: Sequence[str], cwd: Path) -> None:
        """A copy without the outputs of these stages, and with the raw data alone in DVC's cache."""
        shutil.copytree(self.clone, cwd, symlinks=True)
        shutil.rmtree(cwd / ".dvc/cache")
        run([*DVC, "fetch", "--quiet", "data.dvc"], cwd)
        shutil.rmtree(cwd / ".runs")
        lock = cwd / "dvc.lock"
        locked = yaml.safe_load(lock.read_text())
        for stage in stages:
            for out in locked["stages"].pop(stage)["outs"]:
                path = cwd / out["path"]
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        lock.write_text(yaml.safe_dump(locked, sort_keys=False))


def hashes(cwd: Path) -> dict[str, str]:
    files = sorted({path for pattern in RESULTS for path in (cwd / "artifacts").rglob(pattern) if path.is_file()})
    return {str(path.relative_to(cwd)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill(baseline: Baseline, seed: str, cwd: Path) -> tuple[str, str | None]:
    """A description of up to MOST_KILLS of one command, run again after each, and the fault afterwards or None."""
    rng = random.Random(seed)
    (command,) = rng.choices(list(COMMANDS), WEIGHTS)
    stages = some_stages(baseline, rng)
    baseline.copy_without(stages, cwd)
    kills: list[str] = []
    for _ in range(MOST_KILLS):
        process = start(COMMANDS[command], cwd)
        when = wait(process, sum(baseline.seconds[stage] for stage in stages), cwd, rng)
        if process.poll() is not None:
            break
        kills.append(f"{_disturb(process, rng)} {when}, exit code {process.wait(PATIENCE_S)}")
        if command == "dvc repro" and not is_whole(cwd / "dvc.lock"):  # the other commands see to it themselves
            (cwd / "dvc.lock").unlink()
            kills.append("dvc.lock removed")
    if not kills:
        raise RuntimeError(f"{command} of {' and '.join(stages)} had ended, with exit code {process.returncode}")
    return f"{command} of {' and '.join(stages)}: {'; '.join(kills)}", find_fault(baseline, COMMANDS[command], cwd)


def _disturb(process: subprocess.Popen[bytes], rng: random.Random) -> str:
    """Signal one process of a kind that runs now, or all; returns a description."""
    number = rng.choice(list(SIGNALS))
    victim, procs = _victims(process, rng)
    for proc in procs:
        with contextlib.suppress(psutil.NoSuchProcess):
            proc.send_signal(SIGNALS[number])
    if number == "STOP":
        time.sleep(STOPPED_S)
        for proc in procs:
            with contextlib.suppress(psutil.NoSuchProcess):
                proc.send_signal(signal.SIGCONT)
    return f"SIG{number} to {len(procs)} of {victim}"


def some_stages(baseline: Baseline, rng: random.Random) -> list[str]:
    return rng.sample(list(baseline.seconds), rng.choice([1, 1, 2]))


def wait(process: subprocess.Popen[Any], seconds: float, cwd: Path, rng: random.Random) -> str:
    """Wait for a random moment of the stages' run time, or for a write; returns a description of the moment."""
    if rng.random() < 0.5:
        moment = rng.uniform(0, START_S + seconds)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        return f"after {moment:.1f} s"
    file_kind = rng.choice(list(WRITES))
    previous, count = _written(cwd, file_kind), rng.choice([1, 1, 2, 5])
    while process.poll() is None and count:
        if (now := _written(cwd, file_kind)) != previous:
            previous, count = now, count - 1
        time.sleep(0.003)
    return f"at a write of {file_kind}"


def _written(cwd: Path, file_kind: str) -> set[tuple[str, int]]:
    times = set()
    for pattern in WRITES[file_kind]:
        with contextlib.suppress(OSError):  # a folder goes while it is listed
            for path in cwd.glob(pattern):
                with contextlib.suppress(OSError):
                    times.add((str(path), path.stat().st_mtime_ns))
    return times


def find_fault(baseline: Baseline, command: list[str], cwd: Path, environment: Mapping[str, str] = {}) -> str | None:
    """The fault of a disturbed run: processes, bytes and drafts, after the same command has run again; or None."""
    if left := processes_in(cwd):
        commands = []
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                commands.append(f"{' '.join(process.cmdline()[:6])} ({process.status()})")
                process.kill()
        return f"left running: {commands}"
    rerun = execute(command, cwd, environment)
    if rerun.returncode:
        return f"the same command again exits with {rerun.returncode}: {(rerun.stdout + rerun.stderr)[-600:]}"
    if different := {path for path, value in hashes(cwd).items() if baseline.hashes.get(path) != value}:
        return f"other bytes: {sorted(different)}"
    if missing := baseline.hashes.keys() - hashes(cwd).keys():
        return f"missing: {sorted(missing)}"
    status = execute([*DVC, "status", "--json"], cwd)
    if status.stdout.strip() != "{}":
        return f"dvc status: {status.stdout}{status.stderr[-300:]}"
    processes_in(cwd)
    drafts = [path for path in (cwd / "artifacts").rglob("*") if path.name.startswith(".") and path.name != ".gitignore"]
    drafts += [path for path in cwd.rglob("*.tmp") if ".dvc" not in path.parts]
    return f"drafts are left: {sorted(str(path.relative_to(cwd)) for path in drafts)[:5]}" if drafts else None


def _victims(process: subprocess.Popen[bytes], rng: random.Random) -> tuple[str, list[psutil.Process]]:
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    running = defaultdict(list, all=family)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for kind, pattern in VICTIMS.items():
                if re.search(pattern, " ".join(member.cmdline()[1:4])):
                    running[kind].append(member)
    victim = rng.choice(list(running))
    return victim, family if victim == "all" else [rng.choice(running[victim])]


def processes_in(cwd: Path, within_s: float = ENDING_S) -> list[psutil.Process]:
    """Processes that still work in this folder after their time to end."""
    until = time.monotonic() + within_s
    while True:
        left = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if Path(process.cwd()).is_relative_to(cwd) and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.5)


def start(
    command: list[str], cwd: Path, log: Path = Path(os.devnull), preexec_fn: Callable[[], None] | None = None
) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=cwd, env=_environment(), stdout=file, stderr=file, start_new_session=True, preexec_fn=preexec_fn
        )


def run(command: list[str], cwd: Path) -> None:
    result = execute(command, cwd)
    assert result.returncode == 0, f"{command} in {cwd}: {(result.stdout + result.stderr)[-2000:]}"


def execute(command: list[str], cwd: Path, environment: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=_environment() | environment, capture_output=True, text=True, timeout=PATIENCE_S
    )


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    patient = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600"}  # load is no fault
    return {**os.environ, **patient, "PATH": path, "PYTHONPATH": ""}
