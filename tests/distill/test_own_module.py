"""A term that trains a module of its own, and reads maps and hidden states: one file and an arm, through the whole stage."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from components.align_ti import terms
from components.config.load import load_settings
from components.distill.__main__ import distill
from components.distill.launch import launch
from components.errors import Interrupted
from components.tracking.journal import Run
from tests.distill.conftest import REPOSITORY, write_params
from tests.distill.test_scale import StopsAt, legible, runtime

ARM = "kd_projected"
TERM = '''
"""Distance of the visual rows' hidden states under a projection, and of the attention on them. Units: images."""

from dataclasses import dataclass

from torch import nn

from components.align_ti.terms import Needs, images
from components.align_ti.watch import Map, Watch

LOOK = Map(0, "response")


@dataclass(frozen=True)
class Term:
    needs = Needs(response=False, in_student=Watch((LOOK,), (0,)), in_teacher=Watch((LOOK,), (0,)))

    def module(self, student_width, teacher_width):
        return nn.Linear(student_width, teacher_width)

    def units(self, batch, draws):
        return images(batch)

    def loss(self, outputs):
        rows, mine, theirs = outputs.batch.visual, outputs.in_student, outputs.in_teacher
        apart = outputs.modules["projected"](mine.hidden[0][rows]) - theirs.hidden[0][rows]
        return apart.square().sum() + 100 * (mine.maps[LOOK] - theirs.maps[LOOK]).square().sum()
'''


@pytest.fixture
def opened(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workplace with a copy of the code and that file in it, found by the processes started there and by this one."""
    shutil.copytree(REPOSITORY / "components", "components", ignore=shutil.ignore_patterns("__pycache__"))
    path = workplace / "components/align_ti/terms/projected.py"
    path.write_text(TERM)
    name = f"{terms.__name__}.projected"
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    shipped = terms.names()
    monkeypatch.setattr(terms, "names", lambda: [*shipped, "projected"])
    study = yaml.safe_load(Path("params/study.yaml").read_text())
    arm = {"weights": {"sft": 1.0, "kd": 1.0, "tpa": 1.0, "projected": 0.1}, "student": "student", "seed": 1}
    write_params(workplace, "study", {"arms": study["arms"] | {ARM: arm}})
    monkeypatch.setenv("PYTHONPATH", f"{workplace}{os.pathsep}{REPOSITORY}")
    monkeypatch.setenv("ALIGNTI_DEVICE", "cpu")
    return workplace


def trained(run: Run | None = None) -> Path:
    settings = load_settings()
    distill(ARM, settings.arm(ARM), settings, run or Run(None))
    return Path("artifacts/students") / ARM


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_it_is_trained_resumed_to_the_same_bytes_and_not_exported(opened: Path) -> None:
    folder = trained()
    steps, student = losses(folder), (folder / "model/model.safetensors").read_bytes()
    assert steps[-1]["projected"] < steps[0]["projected"], "its own module learns: the student's few steps are small"
    stock = load_file("artifacts/models/students/student/model.safetensors")
    assert load_file(folder / "model/model.safetensors").keys() == stock.keys()
    assert "0.1" in (folder / "model/README.md").read_text() and "projected" in (folder / "model/README.md").read_text()
    shutil.rmtree(folder)
    with pytest.raises(Interrupted, match="stopped at step 3"):
        trained(StopsAt(2))
    (checkpoint,) = Path(".runs/distill").rglob("step-*")
    saved = load_file(checkpoint / "model.safetensors")
    assert saved["method.term_modules.projected.weight"].shape == (48, 32)
    groups = torch.load(checkpoint / "optimizer.bin")["param_groups"]
    assert [group["name"] for group in groups][-1] == "terms" and len(groups[-1]["params"]) == 2
    trained()
    assert losses(folder) == steps and (folder / "model/model.safetensors").read_bytes() == student


@pytest.mark.parametrize(("way", "checkpointing"), [("ddp-cpu", False), ("fsdp2", True)])
def test_two_processes_train_as_one(opened: Path, own_environment: None, way: str, checkpointing: bool) -> None:
    write_params(opened, "distill", {"gradient_checkpointing": checkpointing, "flex_attention": False})
    legible(opened)
    alone = trained()
    expected, student = losses(alone), load_file(alone / "model/model.safetensors")
    shutil.rmtree(alone)
    module = "tests.distill.fsdp2_on_cpu" if way == "fsdp2" else "components.distill"
    launch(runtime(devices=2, accelerate=way), "cpu", ["--arm", ARM], module=module)
    for one_process, two_processes in zip(expected, losses(alone), strict=True):
        assert two_processes == pytest.approx(one_process, rel=1e-5)
    start = load_file("artifacts/models/students/student/model.safetensors")
    weights = load_file(alone / "model/model.safetensors")
    assert weights.keys() == start.keys()
    for name, weight in student.items():
        moved = (weight - start[name]).double().norm()
        assert (weights[name] - weight).double().norm() <= 1e-3 * moved + 1e-6, name
