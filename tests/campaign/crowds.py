"""Many at once: commands on one folder, clones over one remote, fifty arms, studies, servers, held locks, and jumping clocks.

Each may wait, or end with the exit code for a retry; afterwards the bytes are those of one undisturbed run.
"""

from __future__ import annotations

import fcntl
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.campaign.kills import COMMANDS, DVC, PATIENCE_S, Baseline, execute, find_fault, processes_in, run, some_stages, start

CLI = [sys.executable, "-m", "components.cli"]
ARMS = (10, 20, 50)
STUB = "mkdir -p artifacts/students/${key} && printf ${key} >artifacts/students/${key}/x"
LOCKS = (".dvc/tmp/lock", ".dvc/tmp/rwlock.lock", ".mlflow/mlflow.lock", ".runs/journal/.lock")
# Read by Python at its start: each look at the clock may jump, by up to two days, and jumps back.
CLOCK = """
import random, time
_time, _time_ns, _rng = time.time, time.time_ns, random.Random({seed})
def _jump():
    return _rng.choice([0, 0, 0, -172800, -3600, -1, 60, 172800])
time.time = lambda: _time() + _jump()
time.time_ns = lambda: _time_ns() + _jump() * 10**9
"""


def crowd(baseline: Baseline, seed: str, cwd: Path) -> tuple[str, str | None]:
    """A description of the try, and its fault or None."""
    rng = random.Random(seed)
    cwd.mkdir()
    name = rng.choice(sorted(CROWDS))
    did, fault = CROWDS[name](baseline, rng, cwd)
    return f"{name}: {did}", fault


def _commands(baseline: Baseline, rng: random.Random, cwd: Path) -> tuple[str, str | None]:
    stages, names = some_stages(baseline, rng), rng.choices(["make repro", "flow"], k=rng.choice([2, 3, 4]))
    baseline.copy_without(stages, cwd / "run")
    fault = _run_all([COMMANDS[name] for name in names], [cwd / "run"] * len(names), cwd)
    did = f"{', '.join(names)} of {' and '.join(stages)} in one folder"
    return did, fault or find_fault(baseline, COMMANDS["dvc repro"], cwd / "run")


def _clones(baseline: Baseline, rng: random.Random, cwd: Path) -> tuple[str, str | None]:
    """Each builds and pushes outputs that another clone may have pushed."""
    stages, send = some_stages(baseline, rng), [sys.executable, "-c", "from flows import dvc; dvc.push_to_pool()"]
    clones = [cwd / name for name in ("one", "two", "three")[: rng.choice([2, 3])]]
    for clone in clones:
        baseline.copy_without(stages, clone)
        run([*DVC, "remote", "add", "pool", str(cwd / "remote")], clone)
    fault = _run_all([COMMANDS["make repro"]] * len(clones), clones, cwd) or _run_all([send] * len(clones), clones, cwd)
    baseline.copy_without(stages, cwd / "last")
    run([*DVC, "remote", "add", "pool", str(cwd / "remote")], cwd / "last")
    for stage in () if fault else stages:
        restored = execute([sys.executable, "-c", f"from flows import dvc; print(dvc.restore({stage!r}))"], cwd / "last").stdout
        if restored.strip() != "True":
            fault = f"{stage} is not in the remote: {restored}"
    checked = (find_fault(baseline, COMMANDS["dvc repro"], clone) for clone in clones)
    return f"{len(clones)} clones, one remote, {' and '.join(stages)}", fault or next(filter(None, checked), None)


def _arms(baseline: Baseline, rng: random.Random, cwd: Path) -> tuple[str, str | None]:
    """Trainings that write their name and end."""
    arms, jobs, folder = rng.choice(ARMS), rng.choice([2, 4, 8]), cwd / "run"
    baseline.copy_without([], folder)
    study = yaml.safe_load((folder / "params/study.yaml").read_text())
    study["arms"] = {f"arm{number}": study["arms"]["sft"] | {"seed": number} for number in range(arms)}
    (folder / "params/study.yaml").write_text(yaml.safe_dump(study))
    stub = {"foreach": "${arms}", "do": {"cmd": STUB, "outs": ["artifacts/students/${key}"]}}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"vars": ["params/study.yaml:arms"], "stages": {"distill": stub}}))
    (folder / "dvc.lock").unlink()
    result = execute([sys.executable, "-m", "flows.parallel", "--jobs", str(jobs)], folder)
    trained = sum((folder / f"artifacts/students/{arm}/x").read_text() == arm for arm in study["arms"] if not result.returncode)
    left = execute([*DVC, "status", "--json"], folder).stdout.strip()
    fine = not result.returncode and trained == arms and left == "{}"
    return f"{arms} arms, {jobs} at a time", None if fine else f"{trained} made, {left[:200]}, {result.stderr[-400:]}"


def _studies(baseline: Baseline, rng: random.Random, cwd: Path) -> tuple[str, str | None]:
    """Flows with workspaces of their own, over one cache: one builds outputs that the other restores."""
    folder, flows = cwd / "run", rng.choice([2, 3])
    shutil.copytree(baseline.clone, folder, symlinks=True)
    command = [*CLI, "study", "run", "smoke", "--recipe", "smoke", "--parallel", "2"]
    fault = _run_all([command] * flows, [folder] * flows, cwd)
    left = [path.name for path in (folder / ".runs/workspaces").glob("*") if path.is_dir()]
    return f"{flows} times the study smoke", fault or (f"worktrees are left: {left}" if left else None)


def _servers(_baseline: Baseline, rng: random.Random, cwd: Path) -> tuple[str, str | None]:
    folder, port = cwd / "run", rng.randrange(40000, 60000)
    (folder / "params").mkdir(parents=True)
    command = [*CLI, "up", "--mlflow-port", str(port), "--prefect-port", str(port + 1)]
    count = rng.choice([2, 3])
    fault = _run_all([command] * count, [folder] * count, cwd, fine=(0, 2, 75))
    healthy = execute([*CLI, "status"], folder).stdout.count("up at")
    down = execute([*CLI, "down"], folder)
    left = processes_in(folder)
    for process in left:
        process.kill()
    if fault or down.returncode or healthy != 2 or left:
        names = [process.pid for process in left]
        return f"{count} times alignti up", fault or f"{healthy} healthy; after `alignti down` are left: {names}"
    return f"{count} times alignti up", None


def _locks(baseline: Baseline, rng: random.Random, cwd: Path) -> tuple[str, str | None]:
    stages, command, seconds = some_stages(baseline, rng), rng.choice(["make repro", "flow"]), rng.choice([2, 10, 30])
    baseline.copy_without(stages, cwd / "run")
    path = cwd / "run" / rng.choice(LOCKS)
    path.parent.mkdir(parents=True, exist_ok=True)
    process = start(COMMANDS[command], cwd / "run")
    with path.open("a") as file:
        time.sleep(rng.uniform(0, 10))
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_EX)
        time.sleep(seconds)
    process.wait(PATIENCE_S)
    did = f"{command} of {' and '.join(stages)} with {path.relative_to(cwd / 'run')} held for {seconds} s, {process.returncode}"
    return did, find_fault(baseline, COMMANDS[command], cwd / "run") if process.returncode == 0 else "it failed"


def _clock(baseline: Baseline, rng: random.Random, cwd: Path) -> tuple[str, str | None]:
    stages, command = some_stages(baseline, rng), rng.choice(list(COMMANDS))
    baseline.copy_without(stages, cwd / "run")
    (cwd / "clock").mkdir()
    (cwd / "clock/sitecustomize.py").write_text(CLOCK.format(seed=rng.randrange(10**6)))
    result = execute(COMMANDS[command], cwd / "run", {"PYTHONPATH": str(cwd / "clock")})
    did = f"{command} of {' and '.join(stages)}, exit code {result.returncode}"
    if result.returncode:
        return did, (result.stdout + result.stderr)[-700:]
    return did, find_fault(baseline, COMMANDS[command], cwd / "run")


def _run_all(commands: list[list[str]], folders: list[Path], cwd: Path, fine: tuple[int, ...] = (0, 75)) -> str | None:
    """Start all at once; the fault of the first with a traceback or an exit code that is not `fine`."""
    logs = [cwd / f"said-{number}" for number in range(len(commands))]
    running = [start(command, folder, file) for command, folder, file in zip(commands, folders, logs, strict=True)]
    for process, file in zip(running, logs, strict=True):
        code, text = process.wait(PATIENCE_S), file.read_text(errors="replace")
        if code not in fine or "Traceback" in text:
            for other in running:
                other.terminate()
            return f"{process.args} ended with {code}: {text[-700:]}"
    return None


CROWDS: dict[str, Callable[[Baseline, random.Random, Path], tuple[str, str | None]]] = {
    "commands": _commands,
    "clones": _clones,
    "arms": _arms,
    "studies": _studies,
    "servers": _servers,
    "locks": _locks,
    "clock": _clock,
}
