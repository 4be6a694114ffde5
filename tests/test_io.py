from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.errors import DataError
from components.io import sha256, whole_folder, write_bytes
from components.records.evaluate import Prediction
from components.records.record import jsonl
from components.records.teacher import TeacherChoice

CHOICE = TeacherChoice(name="base", path="artifacts/models/teachers/base", sha256="0" * 64)


@given(st.builds(Prediction))
def test_a_record_reads_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, record: Prediction) -> None:
    path = tmp_path_factory.mktemp("records") / "deep/er/record.json"
    assert Prediction.read(record.write(path)) == record


def test_a_record_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        CHOICE.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing; `dvc repro` makes it"), ("{", "is no TeacherChoice"), ('{"name": "x"}', "is no TeacherChoice")],
)
def test_what_is_no_record_is_a_data_error(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "choice.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        TeacherChoice.read(path)


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "choice.json"
    path.write_text(json.dumps({**CHOICE.model_dump(), "reason": "x"}))
    with pytest.raises(DataError):
        TeacherChoice.read(path)


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_digest_depends_on_contents_and_names_and_on_nothing_else(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        for name in ("y", "x") if folder == "a" else ("x", "y"):
            write_bytes(tmp_path / folder / name, name.encode())
    assert sha256([tmp_path / "a"]) == sha256([tmp_path / "b"])
    (tmp_path / "b/x").rename(tmp_path / "b/z")
    assert sha256([tmp_path / "a"]) != sha256([tmp_path / "b"])
    write_bytes(tmp_path / "a/x", b"other")
    assert sha256([tmp_path / "a/x"]) != sha256([tmp_path / "b/z"])


def test_jsonl_is_one_line_a_record() -> None:
    text = jsonl([CHOICE, {"answer": "drei\nünf"}])
    assert [json.loads(line) for line in text.splitlines()] == [CHOICE.model_dump(), {"answer": "drei\nünf"}]


def test_drafts_of_killed_processes_are_removed_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", "pass"])
    killed.wait()
    left = [tmp_path / f".arm.{pid}.{end}" for pid in (killed.pid, os.getppid()) for end in ("tmp", "old")]
    others = [tmp_path / f".arm_2.{killed.pid}.tmp", tmp_path / ".arm.notes.tmp", tmp_path / "arm"]
    for folder in (*left, *others):
        (folder / "model").mkdir(parents=True)
    with whole_folder(tmp_path / "arm") as draft:
        (draft / "weights").touch()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (*left[2:], *others)}
    assert (tmp_path / "arm/weights").exists()
