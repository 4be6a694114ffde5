"""Parts: the same bytes whatever makes them, and whatever befell the run before."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.config.data import DataLimits, DataSettings, LlavaFolder
from components.dataset import shard_jobs
from components.dataset.prepare import prepare
from components.dataset.shard_jobs import make
from components.dataset.source import Refused, Stored
from components.errors import TryAgainError
from components.records.dataset import Manifest
from tests.dataset.conftest import REPOSITORY

IMAGES, PER_SHARD = 64, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    """64 pictures with a question each, one of them asked about again at the end, one of them damaged."""
    folder = tmp_path_factory.mktemp("raw")
    rows = []
    for number in range(IMAGES):
        noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        rows.append(row(f"row-{number}", number))
    (folder / "9.png").write_bytes((folder / "9.png").read_bytes()[:300])
    (folder / "rows.json").write_text(json.dumps([*rows, row("again", 3)]))
    limits = DataLimits(max_pixels=10_000, max_image_mib=1, max_text_chars=100, max_bad_ratio=0.1)
    llava = LlavaFolder(annotations=folder / "rows.json", images=folder, val=0.2, test=0.2)
    return DataSettings(
        source="llava", seed=1, images_per_shard=PER_SHARD, limits=limits, digits=None, llava=llava, mixture=None
    )


def row(id_: str, number: int) -> dict[str, object]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Number {number}."}]
    return {"id": id_, "image": f"{number}.png", "conversations": turns}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def plain(data: DataSettings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """As one process makes it in one go."""
    target = tmp_path_factory.mktemp("plain") / "dataset"
    prepare(data, target=target, workers=1)
    return content(target)


def test_the_number_of_workers_changes_no_byte(
    data: DataSettings, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_jobs, "WORTH_A_WORKER", 1)
    prepare(data, target=tmp_path / "dataset", workers=2)
    assert content(tmp_path / "dataset") == plain
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


KILLED = """
import os, signal, sys
from pathlib import Path
from components.dataset import shard_writer
from components.dataset.prepare import prepare
from components.config.data import DataSettings
left = int(sys.argv[3])
real = shard_writer.SplitWriter.add
def add(self, row):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, row)
shard_writer.SplitWriter.add = add
prepare(DataSettings.model_validate_json(sys.argv[1], strict=False), target=Path(sys.argv[2]), workers=1)
"""


def test_after_kill_9_whole_parts_are_not_made_again(
    data: DataSettings, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "dataset"
    command = [sys.executable, "-c", KILLED, data.model_dump_json(), str(target), "36"]  # in the fifth part, one was bad
    died = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not target.exists()
    assert list((tmp_path / ".dataset.draft").rglob(".*.tmp"))  # half-written
    parts = []
    real = shard_jobs.write_part

    def watched(source: shard_jobs.Source, part: int, *rest: object) -> shard_jobs.Part:
        parts.append(part)
        return real(source, part, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_jobs, "write_part", watched)
    prepare(data, target=target, workers=1)
    assert parts == [4, 5, 6, 7]
    assert content(target) == plain
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_what_was_made_of_other_files_or_settings_is_not_gone_on_from(
    data: DataSettings, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "dataset"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shard_jobs.Part, "write", interrupt)
        prepare(data.model_copy(update={"seed": 2}), target=target, workers=1)
    assert (tmp_path / ".dataset.draft").exists()
    prepare(data, target=target, workers=1)
    assert content(target) == plain


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@dataclass(frozen=True)
class Deadly:
    """The process that makes part 1 dies."""

    title: str = "deadly"
    licence: str = "none"
    images: int = 2 * shard_jobs.WORTH_A_WORKER
    rows_in: int = 2 * shard_jobs.WORTH_A_WORKER
    parts: int = 2
    boxes: bool = False
    several: bool = False

    def rows(self, part: int) -> Iterator[Stored | list[Refused]]:
        if part:
            os.kill(os.getpid(), signal.SIGKILL)
        return iter(())

    def refused(self) -> Iterator[Refused]:
        return iter(())


def test_a_worker_that_is_killed_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TryAgainError, match=r"was killed.*ALIGNTI_WORKERS=1"):
        make(Deadly(), tmp_path, shard_jobs.WORTH_A_WORKER, workers=2, bar=lambda _: None)


def test_where_no_more_can_be_written_nothing_half_written_is_left(
    data: DataSettings, plain: dict[str, bytes], tmp_path: Path
) -> None:
    """A limit on the size of files stands for the full disk: the write fails in the same place."""
    target = tmp_path / "dataset"
    target.mkdir()
    (target / "before").touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (2_000, 60_000, 12_000):  # the index does not fit; the index fits, a shard does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(TryAgainError, match=r"\.dataset\.draft cannot grow .*free space and run again"):
                prepare(data.model_copy(update={"images_per_shard": 60}), target=target, workers=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in target.iterdir()] == ["before"]
        left = {path.name for path in tmp_path.rglob("*") if path.is_file()} - {"before"}
        assert left <= {"started", "index.sqlite"}
    prepare(data, target=target, workers=1)
    assert content(target) == plain


def test_one_percent_of_planted_faults_is_quarantined_each_with_its_reason(data: DataSettings, tmp_path: Path) -> None:
    rows, planted = [], {}
    faults = {
        "missing_file": lambda n: row(f"row-{n}", 9999),
        "damaged": lambda n: row(f"row-{n}", 9),
        "empty_answer": lambda n: row(f"row-{n}", 1) | {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, EMPTY]},
        "image_path": lambda n: row(f"row-{n}", 1) | {"image": "../1.png"},
        "duplicate_id": lambda n: row("row-0", 0),
    }
    for number in range(1500):
        rows.append(row(f"row-{number}", number % IMAGES if number % IMAGES != 9 else 10))
        if number % 100 == 50:
            reason = list(faults)[number // 100 % len(faults)]
            rows[-1] = faults[reason](number)
            planted[number + 1] = reason
    assert data.llava is not None
    annotations = tmp_path / "rows.jsonl"
    annotations.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    llava = data.llava.model_copy(update={"annotations": annotations})
    manifest: Manifest = prepare(data.model_copy(update={"llava": llava}), target=tmp_path / "dataset", workers=1)
    assert (manifest.rows_in, manifest.quarantined, manifest.rows_out) == (1500, 15, 1485)
    lines = (tmp_path / "dataset" / "quarantine.jsonl").read_text().splitlines()
    assert {(entry := json.loads(line))["row"]: entry["reason"] for line in lines} == planted
    assert len(planted) == 15


EMPTY = {"from": "gpt", "value": " "}
