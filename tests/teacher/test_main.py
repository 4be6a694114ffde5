"""The stage `select_teacher`, on a workplace of two tiny candidates."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from components.errors import ModelError
from components.records.models import ModelIndex
from components.records.paths import MODELS, REPORTS, TEACHER
from components.records.teacher import TeacherChoice, TeacherReport
from components.teacher.__main__ import main
from tests.evaluate.conftest import Tracked


def test_the_better_candidate_is_chosen_and_everything_is_written(
    workplace: Path, tracked: Tracked, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(TEACHER)
    main()
    record = ModelIndex.read(MODELS / "index.json").teachers["base"]
    assert TeacherChoice.read(TEACHER / "choice.json") == TeacherChoice(name="base", path=record.path, sha256=record.sha256)
    report = TeacherReport.read(REPORTS / "teacher/candidates.json")
    assert report.chosen == "base"
    assert [c.name for c in report.candidates] == ["base", "small"]
    assert report.reason in (REPORTS / "teacher/table.md").read_text()
    assert (REPORTS / "teacher/quality_cost.png").read_bytes().startswith(b"\x89PNG")
    assert tracked.stage == ("select_teacher", None)
    assert tracked.logged["base/exact_match"] == report.candidates[0].exact_match > 0.9
    assert tracked.logged["small/parameters"] == report.candidates[1].parameters
    assert tracked.tags == {"teacher": "base"}
    assert sorted(path.name for path in tracked.artifacts) == ["candidates.json", "quality_cost.png", "table.md"]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and report.reason in printed and "artifacts/teacher/choice.json" in printed


def test_no_candidate_within_the_limits_is_a_refusal_that_writes_no_choice(workplace: Path, tracked: Tracked) -> None:
    shutil.rmtree(TEACHER)
    settings = Path("params/teacher.yaml")
    settings.write_text(settings.read_text().replace("max_parameters: null", "max_parameters: 10"))
    with pytest.raises(ModelError, match=r"(?s)base: .*max_parameters 10.*small: exact match.*max_parameters 10"):
        main()
    assert not TEACHER.exists()


def test_no_candidate_at_all_is_a_refusal(workplace: Path, tracked: Tracked) -> None:
    ModelIndex(teachers={}, students={}).write(MODELS / "index.json")
    with pytest.raises(ModelError, match="lists no teacher"):
        main()
