"""A project folder with a toy arm, its teacher, what both were made of, and an image to ask about."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from components.config.load import load_settings
from components.config.settings import Settings
from components.dataset.shards import ImageRow, Turn
from components.distill.card import model_card
from components.io import write_text
from components.models.checkpoint_folder import record
from components.records.dataset import Manifest
from components.records.distill import Cost
from components.records.models import ModelIndex
from components.records.paths import DATASET, IRS, MODELS, STUDENTS, TEACHER
from components.records.teacher import TeacherChoice
from tests.families import toy
from tests.layers import layer_choice
from tests.shards import write_split
from tests.tried import keep_all

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def settings() -> Settings:
    return load_settings(ROOT)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LLaVA-OneVision, whose processor's files have its chat template: two layers taught by three."""
    monkeypatch.chdir(tmp_path)
    _dataset()
    models = {"teacher": MODELS / "teachers/base", "student": MODELS / "students/student"}
    for (role, path), source in zip(models.items(), (("org/large", 1, 3), ("org/small", 2, 2)), strict=True):
        shutil.copytree(toy.folder("llava_onevision", *source[1:]), path)
        write_text(path / "README.md", f"---\nlicense: {'other' if role == 'teacher' else 'apache-2.0'}\n---\n# It\n")
    write_text(models["teacher"] / "README.md", "---\nlicense: other\nlicense_name: large-community\n---\n")
    records = {
        "teacher": record(models["teacher"], "teacher", "org/large", COMMIT, None),
        "student": record(models["student"], "student", "org/small", COMMIT, None),
    }
    ModelIndex(teachers={"base": records["teacher"]}, students={"student": records["student"]}).write(MODELS / "index.json")
    TeacherChoice(name="base", path=models["teacher"].as_posix(), sha256="0" * 64).write(TEACHER / "choice.json")
    layer_choice(1, [0.1, 0.3, 0.2]).write(IRS / "layer.json")
    shutil.copytree(toy.folder("llava_onevision", 2, 2), STUDENTS / "align_ti/model")
    write_text(STUDENTS / "align_ti/model/README.md", model_card("align_ti", facts()))
    Cost(train_seconds=90.4, peak_memory_mib=1036.2, device="cpu", steps=800).write(STUDENTS / "align_ti/cost.json")
    Path("cat.png").write_bytes(toy.png(40, 20))
    return tmp_path


def facts(**changed: Any) -> dict[str, Any]:
    """Everything that decided a student's weights, as far as a card states it."""
    arm = {"weights": {"sft": 1.0, "kd": 0.5, "iva": 1.0}, "iva": {"weighting": "irs", "layer": None}}
    trainable = {"vision_tower": False, "projector": True, "language_model": True, "lora": None}
    distill = {
        "stage": "distill",
        "steps": 800,
        "batch_size": 32,
        "optimiser": {"learning_rate": 1e-3},
        "precision": "fp32",
        "trainable": trainable,
    }
    recorded = {"arm": arm, "distill": distill, "irs_layer": 1, "template": {"style": "processor"}}
    return {**recorded, "teacher": {"name": "base"}, "student": {"name": "student"}, **changed}


def _dataset() -> None:
    splits = {}
    for split in ("train", "test"):
        rows = []
        for i, size in enumerate([(40, 20), (16, 16)]):
            turns = (Turn("<image>\nwhat digit ?", "red one"),)
            rows.append(ImageRow(f"{split}-{i}", toy.png(*size, i), ((f"{split}-{i}-0", "digit_at", turns),)))
        splits[split] = write_split(DATASET / split, rows, images_per_shard=50)
    manifest = {"source": "llava", "rows_in": 5, "rows_out": 4, "quarantined": 1, "splits": splits, "digest": "d" * 64}
    Manifest.model_validate(manifest).write(DATASET / "manifest.json")
    keep_all()
    write_text(DATASET / "card.md", "# My cats\n\n- Rows in: 5.\n\n## Licence\n\nCC0, by\nme.\n\n## Counts\n\n| | train |\n")
