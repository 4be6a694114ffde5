"""Records read back as they were written; a damaged file between stages is named, whatever the damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.errors import DataError
from components.records.compare import Comparison
from components.records.distill import Cost
from components.records.evaluate import Prediction
from components.records.record import Absent, jsonl, parsed, parsed_lines
from components.records.teacher import TeacherChoice

CHOICE = TeacherChoice(name="base", path="artifacts/models/teachers/base", sha256="0" * 64)
DAMAGED = {"cut": b'{"none": "x', "empty": b"", "no text": b'{"none": "\xff"}', "a list": b"[]", "nested": b"[" * 100_000}


@given(st.builds(Prediction))
def test_a_record_reads_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, record: Prediction) -> None:
    path = tmp_path_factory.mktemp("records") / "deep/er/record.json"
    assert Prediction.read(record.write(path)) == record


def test_a_record_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        CHOICE.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("fields", [{"name": "x"}, {**CHOICE.model_dump(), "reason": "x"}], ids=["missing", "unknown"])
def test_other_fields_are_refused(fields: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "choice.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match="is no TeacherChoice"):
        TeacherChoice.read(tmp_path / "choice.json")


def test_a_cost_of_no_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text('{"train_seconds": 1.0, "peak_memory_mib": 1.0, "device": "cpu", "steps": 0}')
    with pytest.raises(DataError, match="is no Cost"):
        Cost.read(tmp_path / "cost.json")


def test_jsonl_is_one_line_a_record() -> None:
    text = jsonl([CHOICE, {"answer": "drei\nünf"}])
    assert [json.loads(line) for line in text.splitlines()] == [CHOICE.model_dump(), {"answer": "drei\nünf"}]


@pytest.mark.parametrize("read", [Comparison.read, parsed, parsed_lines])
@pytest.mark.parametrize("content", [*DAMAGED.values(), None, "folder"], ids=[*DAMAGED, "missing", "a folder"])
def test_a_damaged_file_is_named(read: Any, content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    if read is parsed_lines and content == b"":
        assert read(path) == []
        return
    with pytest.raises(DataError, match=str(path)):
        read(path)


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_no_stand_in(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_bytes(content)
    assert Absent.reason_at(tmp_path / "found.json") is None
