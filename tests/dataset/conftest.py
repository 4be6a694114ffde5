import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from components.config.data import DataSettings
from components.config.load import load_settings
from components.dataset.mixture import source
from components.dataset.prepare import prepare, write
from components.dataset.shards import Sample, Samples
from components.dataset.source import Provenance, Refused
from components.digits import raw
from components.records.dataset import Manifest
from components.records.paths import SPLITS

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


class Prepared(NamedTuple):
    settings: DataSettings
    folder: Path
    manifest: Manifest
    provenance: list[Provenance]


@pytest.fixture(scope="session")
def raw_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The handwriting, written from scikit-learn: tests need no `dvc pull`."""
    return raw.write(tmp_path_factory.mktemp("raw")).parent


@pytest.fixture(scope="session")
def digits_settings() -> DataSettings:
    """The shipped settings, with fewer images."""
    shipped = load_settings(REPOSITORY).data
    assert shipped.digits is not None
    sizes = {"images": {"train": 160, "val": 60, "test": 60}}
    digits = shipped.digits.model_copy(update={k: type(shipped.digits.images)(**v) for k, v in sizes.items()})
    return shipped.model_copy(update={"digits": digits, "images_per_shard": 64})


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, raw_folder: Path, digits_settings: DataSettings) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    manifest = prepare(digits_settings, raw_folder, folder)
    lines = (folder / "provenance.jsonl").read_text().splitlines()
    return Prepared(digits_settings, folder, manifest, [Provenance.model_validate_json(line) for line in lines])


def write_only(data: DataSettings, folder: Path, workers: int = 1) -> Manifest:
    """`prepare` without the card, which takes most of its time on so few rows."""
    shutil.rmtree(folder, ignore_errors=True)
    return write(source(data, folder / "index.sqlite", workers), data, folder)


def stored(folder: Path) -> list[Sample]:
    return [sample for split in SPLITS for sample in Samples(folder, split)]


def quarantine(folder: Path) -> list[Refused]:
    return [Refused.model_validate_json(line) for line in (folder / "quarantine.jsonl").read_bytes().splitlines()]
