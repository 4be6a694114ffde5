"""What is damaged between stages is named, whatever the damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.errors import DataError
from components.records.compare import Comparison
from components.records.record import Absent, parsed, parsed_lines

DAMAGED = {"cut": b'{"none": "x', "empty": b"", "no text": b'{"none": "\xff"}', "a list": b"[]", "nested": b"[" * 100_000}


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
