"""`dvc.yaml` says the truth: the code, params and data that each stage names are those that it uses."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.config import recipes
from components.config.settings import FILES
from tests.graph_of_code import ROOT, closure, modules, says_something

DOCUMENT = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES: dict[str, dict[str, Any]] = {name: stage.get("do", stage) for name, stage in DOCUMENT["stages"].items()}
COMMAND = re.compile(r"python -m (components(?:\.\w+)+)(?: --arm (?:\$\{key\}|teacher))?")

# Code that no stage lists; dvc.yaml says why.
NOT_LISTED = frozenset(f"components.{name}" for name in ("config", "records", "io", "errors", "process", "tracking", "runtime"))

# Files beside the code of commands that are no stage, such as `alignti leaderboard`.
COMMANDS = frozenset(
    f"components/{name}"
    for name in (
        "evaluate/controls.html.j2",
        "evaluate/leaderboard.html.j2",
        "evaluate/published.csv",
        "evaluate/samples.html.j2",
        "own_data/preview.html.j2",
        "study/compare.html.j2",
    )
)


def entry(stage: str) -> str:
    """The module that the stage's command runs."""
    command = COMMAND.fullmatch(STAGES[stage]["cmd"])
    assert command, STAGES[stage]["cmd"]
    name = command[1]
    return f"{name}.__main__" if f"{name}.__main__" in modules() else name


def declared_params(stage: str) -> dict[str, list[str] | None]:
    """File name -> the keys that the stage reads, None for all of them."""
    return {Path(file).stem: keys for entry in STAGES[stage]["params"] for file, keys in entry.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_lists_the_code_that_it_imports(stage: str) -> None:
    needed = {modules()[name] for name in closure(entry(stage), NOT_LISTED)}
    needed = {str(path.relative_to(ROOT)) for path in needed if says_something(path)}
    listed: set[str] = set()
    for dep in STAGES[stage]["deps"]:
        if dep.startswith("components"):
            path = ROOT / dep
            files = path.rglob("*.py") if path.is_dir() else [path]
            listed |= {str(file.relative_to(ROOT)) for file in files if file.suffix == ".py" and says_something(file)}
    if stage == "terms":  # which hashes these files
        needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "components/align_ti").rglob("*.py") if says_something(path)}
    missing, idle = sorted(needed - listed), sorted(listed - needed)
    assert not missing, f"{stage} imports what it does not list: a change there would leave its result stale"
    assert not idle, f"{stage} lists what it does not import: a change there would run it for nothing"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_params_files_that_it_reads(stage: str) -> None:
    read: set[str] = set()
    for name in closure(entry(stage), NOT_LISTED):
        for node in ast.walk(ast.parse(modules()[name].read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "settings":
                read |= {node.attr} & set(FILES)
                read |= {"study"} if node.attr == "arm" else set()
    if stage in ("evaluate", "evaluate_teacher"):
        read -= {"study"}  # only for the names of the arms, which are the stages' own
    assert read - {"runtime"} <= set(declared_params(stage))


def test_files_that_code_reads_beside_it_are_listed_too() -> None:
    beside = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "components").rglob("*.*")
        if path.suffix not in (".py", ".pyc", ".typed")
    }
    assert beside - COMMANDS <= {dep for stage in STAGES.values() for dep in stage["deps"]}


def test_no_stage_depends_on_what_does_not_change_results() -> None:
    for stage, content in STAGES.items():
        assert "runtime" not in declared_params(stage)
        assert not any(dep.startswith((".runs", ".mlflow", "params")) for dep in content["deps"])
        assert not any(out.startswith(".runs") for out in content["outs"])


def test_params_named_exist_and_every_params_file_is_some_stages() -> None:
    named: set[str] = set()
    for stage in STAGES:
        for file, keys in declared_params(stage).items():
            named.add(file)
            values = yaml.safe_load((ROOT / "params" / f"{file}.yaml").read_text())
            assert set(keys or ()) <= set(values) | {"arms.${key}"}
    assert named == set(FILES) - {"runtime"}


def test_every_stage_says_what_it_is_for() -> None:
    assert all(len(stage["desc"]) > 20 for stage in STAGES.values())


# --- the graph itself, with the work taken out ------------------------------------------------------------------------

# Writes something that depends on everything its stage reads.
STUB = """
import hashlib, json, sys
from pathlib import Path
name, inputs, outs = json.loads(sys.argv[1])
digest = hashlib.sha256()
for item in inputs:
    for file in sorted(p for p in Path(item).rglob("*") if p.is_file()) if Path(item).is_dir() else [Path(item)]:
        digest.update(file.read_bytes())
with open("ran.log", "a") as log:
    log.write(name + "\\n")
for out in outs:
    path = Path(out) if Path(out).suffix else Path(out, "model/weights")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name + digest.hexdigest())
"""
ARM = "  {name}:\n    weights: {{sft: 1.0, kd: {kd}, iva: 0.0, tpa: 0.0}}\n    student: student\n    seed: 1\n"


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository's `dvc.yaml` and params, each command replaced by the stub."""
    root = tmp_path_factory.mktemp("graph")
    for folder in ("params", "components"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "data").mkdir()
    (root / "data/digits").write_text("raw")
    recipes.use("smoke", root)
    with (root / "params/study.yaml").open("a") as study:
        study.write(ARM.format(name="kd", kd=1.0))
    document = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    for name, stage in document["stages"].items():
        body = stage.get("do", stage)
        label = f"{name}@${{key}}" if "do" in stage else name
        inputs = [dep for dep in body["deps"] if not dep.startswith("components")]
        outs = body["outs"] + body.get("metrics", [])
        inputs += [file for entry in body["params"] for file in entry]
        body["cmd"] = f"python stub.py '{json.dumps([label, inputs, outs])}'"
        if name == "terms":
            body["cmd"] = "python -m components.distill.code && echo terms >> ran.log"
    (root / "dvc.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    (root / "stub.py").write_text(STUB)
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text("[core]\n    no_scm = True\n")
    return root


def repro(root: Path) -> set[str]:
    """Stages that a plain `dvc repro` runs."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=root, env=environment, check=True)
    log = root / "ran.log"
    names = set(log.read_text().split()) if log.exists() else set()
    log.unlink(missing_ok=True)
    return names


@pytest.fixture(scope="module")
def reproduced(stub: Path) -> Path:
    arms = ("sft", "align_ti", "kd")
    assert repro(stub) == {
        *(name for name in STAGES if name not in ("distill", "evaluate")),
        *(f"{stage}@{arm}" for stage in ("distill", "evaluate") for arm in arms),
    }
    return stub


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_second_repro_runs_nothing(reproduced: Path) -> None:
    assert repro(reproduced) == set()


def test_a_changed_arm_runs_that_arm_its_evaluation_and_compare(reproduced: Path) -> None:
    change(reproduced / "params/study.yaml", "iva: 1.0, tpa: 1.0", "iva: 0.5, tpa: 1.0")
    assert repro(reproduced) == {"terms", "distill@align_ti", "evaluate@align_ti", "compare"}


def test_a_new_arm_runs_alone(reproduced: Path) -> None:
    with (reproduced / "params/study.yaml").open("a") as study:
        study.write(ARM.format(name="more", kd=2.0))
    assert repro(reproduced) == {"terms", "distill@more", "evaluate@more", "compare"}


def test_runtime_params_run_nothing(reproduced: Path) -> None:
    change(reproduced / "params/runtime.yaml", "threads: ", "threads: 1")
    assert repro(reproduced) == set()


def test_a_report_setting_runs_compare_alone(reproduced: Path) -> None:
    change(reproduced / "params/evaluate.yaml", "bootstrap_resamples: 100", "bootstrap_resamples: 101")
    assert repro(reproduced) == {"compare"}


NEW_TERM = """
from dataclasses import dataclass
from components.align_ti.row_weights import entropy
from components.align_ti.terms import Needs


@dataclass(frozen=True)
class Term:
    scale: float = 1.0
    needs = Needs(live=True)
"""


def test_a_new_term_reruns_no_arm_and_its_arm_runs_alone(reproduced: Path) -> None:
    (reproduced / "components/align_ti/terms/fresh.py").write_text(NEW_TERM)
    assert repro(reproduced) == {"terms"}
    with (reproduced / "params/study.yaml").open("a") as study:
        study.write(
            "  fresh:\n    weights: {sft: 1.0, fresh: 0.5}\n    fresh: {scale: 2.0}\n    student: student\n    seed: 1\n"
        )
    assert repro(reproduced) == {"terms", "distill@fresh", "evaluate@fresh", "compare"}


def test_an_edited_term_reruns_the_arms_that_use_it(reproduced: Path) -> None:
    with (reproduced / "components/align_ti/terms/iva.py").open("a") as term:
        term.write("# another line\n")
    assert repro(reproduced) == {"terms", "distill@align_ti", "evaluate@align_ti", "compare"}
