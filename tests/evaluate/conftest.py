"""One tiny model, one tiny data set, and one tiny workplace that stages run in, for the whole session."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from components.config.load import load_settings
from components.dataset.shards import Samples
from components.evaluate.generate import answers, questions
from components.models.checkpoint_folder import record
from components.models.load import Loaded, load
from components.models.template import Template
from components.records.models import ModelIndex
from components.records.paths import DATASET, MODELS, STUDENTS, TEACHER
from components.records.teacher import TeacherChoice
from tests.evaluate import tiny

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model", seed=0)


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> Loaded:
    return load(model_folder, "cpu")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_dataset(tmp_path_factory.mktemp("tiny") / "dataset", images=8)


@pytest.fixture(scope="session")
def samples(dataset: Path) -> Samples:
    return Samples(dataset, "test")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings, data, two teacher candidates and two students, as earlier stages leave them.

    The references of `val` and of `test` are what the model `base` answers, except where that is empty: so `base`, and the
    student `sft`, which is the same model, are right (nearly) everywhere, and the others hardly anywhere.
    """
    root = tmp_path_factory.mktemp("workplace")
    shutil.copytree(REPOSITORY / "params", root / "params")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        base = tiny.save_model(MODELS / "teachers/base", seed=0)
        small = tiny.save_model(MODELS / "teachers/small", seed=1, hidden=16)
        shutil.copytree(base, STUDENTS / "sft/model")
        shutil.copytree(small, STUDENTS / "kd/model")
        tiny.save_dataset(DATASET, images=8)
        loaded_base = load(base, "cpu")
        references: dict[str, str] = {}
        for split in ("val", "test"):
            split_samples = Samples(DATASET, split)
            rows = questions(split_samples)
            predicted = answers(loaded_base, split_samples, rows, Template(""), 64, load_settings().evaluate, "references")
            references.update((split_samples[row].id, answer) for row, answer in zip(rows, predicted, strict=True) if answer)
        shutil.rmtree(DATASET)
        tiny.save_dataset(DATASET, images=8, references=references)
        teachers = {path.name: record(path, "teacher", "embedded", None, visual_tokens=16) for path in (base, small)}
        ModelIndex(teachers=teachers, students={}).write(MODELS / "index.json")
        TeacherChoice(name="small", path=small.as_posix(), sha256="0" * 64).write(TEACHER / "choice.json")
    return root


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of `prepared`, as the working directory."""
    shutil.copytree(prepared, tmp_path / "workplace")
    monkeypatch.chdir(tmp_path / "workplace")
    monkeypatch.setenv("ALIGNTI_THREADS", "1")  # two would spin against whatever else runs
    return tmp_path / "workplace"


class Tracked:
    """The tracker's calls of one stage."""

    def __init__(self) -> None:
        self.stage: tuple[str, str | None] | None = None
        self.params: dict[str, Any] = {}
        self.logged: dict[str, float] = {}
        self.artifacts: list[Path] = []
        self.datasets: list[tuple[str, str]] = []
        self.tags: dict[str, str] = {}

    def metrics(self, figures: dict[str, float], step: int | None = None) -> None:
        self.logged.update(figures)

    def artifact(self, path: Path) -> None:
        assert path.is_file()
        self.artifacts.append(path)

    def dataset(self, name: str, digest: str) -> None:
        self.datasets.append((name, digest))

    def tag(self, key: str, value: str) -> None:
        self.tags[key] = value


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> Tracked:
    """A stub of the tracker that records its calls: these tests are not about MLflow."""
    tracker = Tracked()

    @contextmanager
    def stage_run(stage: str, cell: str | None = None, *, runtime: object, params: dict[str, Any]) -> Iterator[Tracked]:
        tracker.stage, tracker.params = (stage, cell), params
        yield tracker

    monkeypatch.setattr("components.tracking.stage_run.stage_run", stage_run)
    return tracker
