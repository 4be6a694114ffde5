"""Many at once: commands on one folder, clones over one remote, fifty arms, studies, servers, held locks, and jumping clocks.

Each may wait, or say that it may be tried again; afterwards the bytes are those of one undisturbed run.
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

from tests.campaign.kills import COMMANDS, DVC, PATIENCE_S, Undisturbed, done, processes_in, run, some_stages, start, wrong

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


def crowd(undisturbed: Undisturbed, seed: str, here: Path) -> tuple[str, str | None]:
    """What was done, and what was wrong."""
    rng = random.Random(seed)
    here.mkdir()
    name = rng.choice(sorted(CROWDS))
    did, fault = CROWDS[name](undisturbed, rng, here)
    return f"{name}: {did}", fault


def _commands(undisturbed: Undisturbed, rng: random.Random, here: Path) -> tuple[str, str | None]:
    stages, names = some_stages(undisturbed, rng), rng.choices(["make repro", "flow"], k=rng.choice([2, 3, 4]))
    undisturbed.without(stages, here / "run")
    said = _together([COMMANDS[name] for name in names], [here / "run"] * len(names), here)
    did = f"{', '.join(names)} of {' and '.join(stages)} in one folder"
    return did, said or wrong(undisturbed, COMMANDS["dvc repro"], here / "run")


def _clones(undisturbed: Undisturbed, rng: random.Random, here: Path) -> tuple[str, str | None]:
    """Each makes and sends what the other may have sent."""
    stages, send = some_stages(undisturbed, rng), [sys.executable, "-c", "from flows import dvc; dvc.push_to_pool()"]
    clones = [here / name for name in ("one", "two", "three")[: rng.choice([2, 3])]]
    for clone in clones:
        undisturbed.without(stages, clone)
        run([*DVC, "remote", "add", "pool", str(here / "remote")], clone)
    said = _together([COMMANDS["make repro"]] * len(clones), clones, here) or _together([send] * len(clones), clones, here)
    undisturbed.without(stages, here / "last")
    run([*DVC, "remote", "add", "pool", str(here / "remote")], here / "last")
    for stage in () if said else stages:
        restored = done([sys.executable, "-c", f"from flows import dvc; print(dvc.restore({stage!r}))"], here / "last").stdout
        if restored.strip() != "True":
            said = f"{stage} is not in the remote: {restored}"
    checked = (wrong(undisturbed, COMMANDS["dvc repro"], clone) for clone in clones)
    return f"{len(clones)} clones, one remote, {' and '.join(stages)}", said or next(filter(None, checked), None)


def _arms(undisturbed: Undisturbed, rng: random.Random, here: Path) -> tuple[str, str | None]:
    """Trainings that write their name and end."""
    arms, jobs, folder = rng.choice(ARMS), rng.choice([2, 4, 8]), here / "run"
    undisturbed.without([], folder)
    study = yaml.safe_load((folder / "params/study.yaml").read_text())
    study["arms"] = {f"arm{number}": study["arms"]["sft"] | {"seed": number} for number in range(arms)}
    (folder / "params/study.yaml").write_text(yaml.safe_dump(study))
    stub = {"foreach": "${arms}", "do": {"cmd": STUB, "outs": ["artifacts/students/${key}"]}}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"vars": ["params/study.yaml:arms"], "stages": {"distill": stub}}))
    (folder / "dvc.lock").unlink()
    ended = done([sys.executable, "-m", "flows.parallel", "--jobs", str(jobs)], folder)
    made = sum((folder / f"artifacts/students/{arm}/x").read_text() == arm for arm in study["arms"] if not ended.returncode)
    left = done([*DVC, "status", "--json"], folder).stdout.strip()
    fine = not ended.returncode and made == arms and left == "{}"
    return f"{arms} arms, {jobs} at a time", None if fine else f"{made} made, {left[:200]}, {ended.stderr[-400:]}"


def _studies(undisturbed: Undisturbed, rng: random.Random, here: Path) -> tuple[str, str | None]:
    """Flows with workspaces of their own, over one cache: one makes what the other restores."""
    folder, flows = here / "run", rng.choice([2, 3])
    shutil.copytree(undisturbed.clone, folder, symlinks=True)
    words = [*CLI, "study", "run", "smoke", "--recipe", "smoke", "--parallel", "2"]
    said = _together([words] * flows, [folder] * flows, here)
    left = [path.name for path in (folder / ".runs/workspaces").glob("*") if path.is_dir()]
    return f"{flows} times the study smoke", said or (f"worktrees are left: {left}" if left else None)


def _servers(_undisturbed: Undisturbed, rng: random.Random, here: Path) -> tuple[str, str | None]:
    folder, port = here / "run", rng.randrange(40000, 60000)
    (folder / "params").mkdir(parents=True)
    words = [*CLI, "up", "--mlflow-port", str(port), "--prefect-port", str(port + 1)]
    count = rng.choice([2, 3])
    said = _together([words] * count, [folder] * count, here, fine=(0, 2, 75))
    healthy = done([*CLI, "status"], folder).stdout.count("up at")
    down = done([*CLI, "down"], folder)
    left = processes_in(folder)
    for one in left:
        one.kill()
    if said or down.returncode or healthy != 2 or left:
        names = [one.pid for one in left]
        return f"{count} times alignti up", said or f"{healthy} healthy; after `alignti down` are left: {names}"
    return f"{count} times alignti up", None


def _locks(undisturbed: Undisturbed, rng: random.Random, here: Path) -> tuple[str, str | None]:
    stages, command, seconds = some_stages(undisturbed, rng), rng.choice(["make repro", "flow"]), rng.choice([2, 10, 30])
    undisturbed.without(stages, here / "run")
    path = here / "run" / rng.choice(LOCKS)
    path.parent.mkdir(parents=True, exist_ok=True)
    process = start(COMMANDS[command], here / "run")
    with path.open("a") as file:
        time.sleep(rng.uniform(0, 10))
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_EX)
        time.sleep(seconds)
    process.wait(PATIENCE_S)
    did = (
        f"{command} of {' and '.join(stages)} with {path.relative_to(here / 'run')} held for {seconds} s, {process.returncode}"
    )
    return did, wrong(undisturbed, COMMANDS[command], here / "run") if process.returncode == 0 else "it failed"


def _clock(undisturbed: Undisturbed, rng: random.Random, here: Path) -> tuple[str, str | None]:
    stages, command = some_stages(undisturbed, rng), rng.choice(list(COMMANDS))
    undisturbed.without(stages, here / "run")
    (here / "clock").mkdir()
    (here / "clock/sitecustomize.py").write_text(CLOCK.format(seed=rng.randrange(10**6)))
    ended = done(COMMANDS[command], here / "run", {"PYTHONPATH": str(here / "clock")})
    did = f"{command} of {' and '.join(stages)}, exit code {ended.returncode}"
    if ended.returncode:
        return did, (ended.stdout + ended.stderr)[-700:]
    return did, wrong(undisturbed, COMMANDS[command], here / "run")


def _together(commands: list[list[str]], folders: list[Path], here: Path, fine: tuple[int, ...] = (0, 75)) -> str | None:
    """Start all at once; what was wrong with one that ended otherwise than as is `fine`."""
    said = [here / f"said-{number}" for number in range(len(commands))]
    running = [start(command, folder, file) for command, folder, file in zip(commands, folders, said, strict=True)]
    for process, file in zip(running, said, strict=True):
        code, text = process.wait(PATIENCE_S), file.read_text(errors="replace")
        if code not in fine or "Traceback" in text:
            for other in running:
                other.terminate()
            return f"{process.args} ended with {code}: {text[-700:]}"
    return None


CROWDS: dict[str, Callable[[Undisturbed, random.Random, Path], tuple[str, str | None]]] = {
    "commands": _commands,
    "clones": _clones,
    "arms": _arms,
    "studies": _studies,
    "servers": _servers,
    "locks": _locks,
    "clock": _clock,
}
