"""A workplace as earlier stages leave it: settings, data, a random teacher and student, a chosen layer. Built once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.dataset.shards import ImageRow, Turn
from components.models.checkpoint_folder import record
from components.models.collate import Collator
from components.models.template import Template
from components.records.dataset import Manifest
from components.records.models import ModelIndex
from components.records.paths import DATASET, IRS, MODELS, TEACHER
from components.records.teacher import TeacherChoice
from tests.layers import layer_choice
from tests.models.conftest import IMAGE_PX, NV, png, saved, word_processor
from tests.shards import write_split
from tests.tried import keep_all

REPOSITORY = Path(__file__).parents[2]
WORDS = ["one", "two", "three", "red", "green", "yes", "no"]
STEPS = 6
OVERLAY: dict[str, Any] = {
    "models": {"max_length": 64},
    "distill": {"steps": STEPS, "batch_size": 4, "micro_batch_size": 4, "log_every": 1, "checkpoint_every": 2},
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distill")
    shutil.copytree(REPOSITORY / "params", root / "params")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for file, values in OVERLAY.items():
            write_params(root, file, values)
        train = write_split(DATASET / "train", [_row(i) for i in range(8)], images_per_shard=4)
        digest = train.shards[0].sha256
        Manifest(source="digits", rows_in=8, rows_out=8, quarantined=0, splits={"train": train}, digest=digest).write(
            DATASET / "manifest.json"
        )
        processor = word_processor()
        reads = Collator(processor, Template(""), 64, train=True)
        keep_all(tokens=lambda sample: len(reads.encode([sample])[0].input_ids))
        teacher = saved(MODELS / "teachers/base", processor, hidden=48)
        student = saved(MODELS / "students/student", processor)
        index = ModelIndex(
            teachers={"base": record(teacher, "teacher", "embedded", None, NV)},
            students={"student": record(student, "student", "embedded", None, NV)},
        )
        index.write(MODELS / "index.json")
        chosen = index.teachers["base"]
        TeacherChoice(name="base", path=chosen.path, sha256=chosen.sha256).write(TEACHER / "choice.json")
        layer_choice(1, [0.1, 0.2]).write(IRS / "layer.json")
    return root


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its own to work in."""
    root = tmp_path / "workplace"
    shutil.copytree(prepared, root)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def own_environment() -> Iterator[None]:
    """`launch` writes to the environment for its processes; a stage ends there, a test does not."""
    original = dict(os.environ)
    yield
    for name in set(os.environ) - set(original):
        del os.environ[name]
    os.environ |= original


def write_params(root: Path, file: str, values: dict[str, Any]) -> None:
    path = root / "params" / f"{file}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def _row(i: int) -> ImageRow:
    """The last two show a second image in a second turn."""
    more = (png(i + 20, IMAGE_PX),) * (i > 5)
    later = (Turn("list the <image> red.", "two"),) * len(more)
    samples = [
        (f"{i}-caption", "caption", (Turn("<image>\ndescribe the grid.", "red one"), *later)),
        (f"{i}-digit", "digit_at", (Turn("<image>\nwhat digit is at a1?", WORDS[i % 3]), *later)),
        (f"{i}-list", "list", (Turn("<image>\nlist the red.", " ".join(WORDS[: 1 + i % 3])), *later)),
    ]
    return ImageRow(f"image-{i}", png(i, IMAGE_PX), tuple(samples), more)
