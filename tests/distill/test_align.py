"""Stage 1: captions and cross-entropy alone, with no teacher anywhere."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from components.config.distill import DistillSettings
from components.config.load import load_settings
from components.distill.assemble import training_indices
from components.errors import DataError
from components.evaluate.__main__ import main as evaluate
from components.evaluate.compare import main as compare
from components.irs.__main__ import main as search_layer
from components.models.__main__ import main as obtain_models
from components.records.compare import Comparison
from components.records.evaluate import Scores
from components.records.models import ModelIndex
from components.records.paths import IRS, MODELS, TEACHER
from components.records.teacher import TeacherChoice
from components.teacher.__main__ import main as select_teacher
from tests.distill.conftest import write_params
from tests.distill.test_stage import run
from tests.layers import layer_choice
from tests.models.conftest import saved, word_processor


@pytest.fixture
def aligning(workplace: Path) -> Path:
    """No teacher in the settings, none on the disk."""
    for folder in (TEACHER, IRS, MODELS / "teachers"):
        shutil.rmtree(folder)
    index = ModelIndex.read(MODELS / "index.json")
    ModelIndex(teachers={}, students=index.students).write(MODELS / "index.json")
    student = {"source": "theirs", "revision": None}
    family: dict[str, Any] = {"teachers": {}, "students": {"student": student}}
    write_params(workplace, "models", {"family": "pretrained", "embedded": None, "pretrained": family})
    weights = {"sft": 1.0, "kd": 0.0, "iva": 0.0, "tpa": 0.0}
    write_params(workplace, "study", {"arms": {"align": {"weights": weights, "student": "student", "seed": 1}}})
    write_params(workplace, "evaluate", {"baselines": ["align"]})
    trainable = {"vision_tower": False, "projector": True, "language_model": False, "lora": None}
    write_params(workplace, "distill", {"stage": "align", "trainable": trainable, "steps": 12})
    return workplace


def test_stage_1_has_no_teacher_and_says_so(aligning: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select_teacher()
    search_layer()
    assert capsys.readouterr().out.count("nothing to do, params/distill.yaml:stage is align") == 2
    assert json.loads(Path("reports/irs/curve.json").read_text()) == []  # what dvc.yaml plots
    with pytest.raises(DataError, match=r"choice.json holds no TeacherChoice: .*stage is align"):
        TeacherChoice.read(TEACHER / "choice.json")


def test_nothing_is_compared_and_dvc_repro_comes_to_its_end(
    aligning: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    select_teacher()
    monkeypatch.setattr(sys, "argv", ["evaluate", "--arm", "teacher"])
    evaluate()
    Scores(arm="align", samples=4, exact_match=0.25, per_kind={}, yes_no={}, token_f1=0.5, token_f1_per_kind={}).write(
        Path("artifacts/scores/align/scores.json")
    )
    compare()
    output = capsys.readouterr().out
    assert "evaluate teacher: nothing to do" in output and "compare: nothing to do" in output
    assert "| align | 25.0% |" in Path("reports/compare.md").read_text()
    assert Path("reports/plots").is_dir() and Path("reports/report.html").exists()  # dvc.yaml lists them
    with pytest.raises(DataError, match=r"compare.json holds no Comparison: .*stage is align"):
        Comparison.read(Path("reports/compare.json"))


def test_it_trains_on_the_captions(aligning: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("align")
    losses = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert losses[-1]["sft"] < losses[0]["sft"] and not any(losses[0][term] for term in ("kd", "iva", "tpa"))
    assert "8 samples of 24; " in capsys.readouterr().out
    card = (folder / "model/README.md").read_text()
    assert "from captions, before distillation" in card and '"teacher": null' in card


def test_what_it_made_is_the_start_of_a_distillation(aligning: Path) -> None:
    run("align")
    teacher = saved(aligning / "theirs", word_processor(), hidden=48)
    student_source = {"source": "artifacts/students/align/model", "revision": None}
    family = {"teachers": {"base": {"source": str(teacher), "revision": None}}, "students": {"student": student_source}}
    write_params(aligning, "models", {"pretrained": family})
    weights = dict.fromkeys(("sft", "kd", "iva", "tpa"), 1.0)
    write_params(aligning, "study", {"arms": {"next": {"weights": weights, "student": "student", "seed": 1}}})
    write_params(aligning, "evaluate", {"baselines": ["next"]})
    trainable = {"vision_tower": False, "projector": True, "language_model": True, "lora": None}
    write_params(aligning, "distill", {"stage": "distill", "trainable": trainable})
    obtain_models()
    chosen = ModelIndex.read(MODELS / "index.json").teachers["base"]
    TeacherChoice(name="base", path=chosen.path, sha256=chosen.sha256).write(TEACHER / "choice.json")
    layer_choice(1, [0, 1]).write(IRS / "layer.json")
    losses = [json.loads(line) for line in (run("next") / "losses.jsonl").read_text().splitlines()]
    assert losses[-1]["total"] < losses[0]["total"] and all(losses[0][term] > 0 for term in weights)


def test_captions_are_those_marked_so_or_all_there_is(aligning: Path) -> None:
    align: DistillSettings = load_settings().distill
    distill = align.model_copy(update={"stage": "distill"})
    assert training_indices(["caption", "list", "caption"], align) == [0, 2]
    assert training_indices(["caption", "list", "caption"], distill) == [1]
    assert training_indices(["instruction", "instruction"], align) == [0, 1]
    with pytest.raises(DataError, match="'caption', which stage align alone trains on"):
        training_indices(["caption", "caption"], distill)
