"""A project folder with two toy arms, their teacher, and an image to ask about."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from components.artifacts import IRS, STUDENTS, TEACHER, LayerChoice, TeacherChoice
from components.settings import Settings, load_settings
from tests.families import toy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def settings() -> Settings:
    """As shipped, its answers no longer than a test needs."""
    return load_settings(ROOT)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LLaVA-OneVision, which says in its processor's files how it is asked: two layers taught by three."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy.folder("llava_onevision", 2, 2), STUDENTS / "align_ti/model")
    teacher = Path(shutil.copytree(toy.folder("llava_onevision", 1, 3), "artifacts/models/teachers/base"))
    TeacherChoice(name="base", path=teacher.as_posix(), sha256="0" * 64).write(TEACHER / "choice.json")
    LayerChoice(layer=1, irs=[0.1, 0.3, 0.2], standard_error=[0.01] * 3, separated=True, runner_up=2, images=9, pairs=27).write(
        IRS / "layer.json"
    )
    Path("cat.png").write_bytes(toy.png(40, 20))
    return tmp_path
