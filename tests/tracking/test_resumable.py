"""A draft that is resumed: what was written whole goes on, what a kill left half written does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.io import write_text
from components.records.record import Absent
from components.tracking.resumable import resumable

CODE = "components.teacher_answers.__main__"


def test_what_a_kill_left_half_written_does_not_reach_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target, facts = Path("artifacts/answers"), Absent(none="facts")
    with pytest.raises(KeyboardInterrupt), resumable(target, facts, CODE) as draft:
        write_text(draft / "part-00000.jsonl", "whole")
        (draft / ".part-00001.jsonl.4321.tmp").write_text("ha")
        raise KeyboardInterrupt
    assert not target.exists()
    with resumable(target, facts, CODE) as draft:
        assert (draft / "part-00000.jsonl").read_text() == "whole"
        write_text(draft / "part-00001.jsonl", "too")
    assert sorted(path.name for path in target.iterdir()) == ["part-00000.jsonl", "part-00001.jsonl"]
