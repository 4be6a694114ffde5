"""The table: the paper's own arithmetic, what is ours and what is not, and nothing invented."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from components.config.study import Arm
from components.errors import DataError
from components.evaluate import speed
from components.evaluate.benchmarks import PAPER
from components.evaluate.compare import compare
from components.evaluate.leaderboard import (
    KIT_NOTE,
    Leaderboard,
    build,
    cells,
    markdown,
    page,
    read_published,
    relative_gain,
    sections,
    write,
)
from components.evaluate.load_results import read
from components.evaluate.speed import Speed, SpeedReport
from components.records.compare import Comparison
from components.records.models import ModelIndex, ModelRecord
from components.records.teacher import TeacherChoice
from tests.evaluate.study import ARMS, study_arms, write_study
from tests.evaluate.test_compare import SETTINGS

TEACHER = TeacherChoice(name="base", path="artifacts/models/teachers/base", sha256="0" * 64)
SPEED = Speed(model="5" * 64, device="cpu", tokens_per_second=512.4, first_token_ms=12.34, memory_mib=5.6, parameters=9)
Finished = tuple[Path, Comparison, dict[str, Arm]]


def record(name: str, parameters: int) -> ModelRecord:
    return ModelRecord(
        name=name,
        role="teacher",
        path="",
        origin="embedded",
        revision=None,
        parameters=parameters,
        size_bytes=0,
        sha256="",
        visual_tokens=16,
    )


INDEX = ModelIndex(teachers={"base": record("base", 1_204_880)}, students={"student": record("student", 301_220)})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("board")
    write_study(root, images=20, pictures=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        study = study_arms()
        return root, compare(read(ARMS), SETTINGS, study), study


@pytest.fixture
def board(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> Leaderboard:
    root, comparison, study = finished
    monkeypatch.chdir(root)
    return build(comparison, INDEX, TEACHER, study, None)


def test_the_paper_s_gains_follow_from_its_published_rows(board: Leaderboard) -> None:
    """Stated in arXiv 2602.09483: 3.7% over SFT, 2.6% over vanilla KD, and Align-TI-2B 7.0% over LLaVA-1.5-7B."""
    rows = {row.name: row for row in board.rows}
    assert rows["Align-TI Qwen2.5-0.5B"].gain_sft == 3.7
    assert rows["Align-TI Qwen2.5-0.5B"].gain_kd == 2.6
    larger, seven = rows["Align-TI Qwen3-1.7B"].average, rows["LLaVA-1.5-7B"].average
    assert larger is not None and seven is not None
    assert relative_gain(larger, seven) == 7.0
    assert rows["Align-TI Qwen3-1.7B"].gain_sft is None  # no baseline of its backbone was published
    assert rows["SFT Qwen2.5-0.5B"].gain_sft is None


def test_published_averages_are_the_mean_of_their_six_scores() -> None:
    for row in read_published():
        six = [value for value in row.scores.values() if value is not None]
        if len(six) == len(PAPER):
            assert row.average == pytest.approx(sum(six) / 6, abs=0.0501), row  # to the decimal that was published
        assert row.source


def test_our_rows_come_first_and_say_what_they_measured(board: Leaderboard, finished: Finished) -> None:
    _, comparison, _ = finished
    ours = [row for row in board.rows if row.ours]
    assert [row.name for row in ours] == ["teacher", *comparison.order] == [row.name for row in board.rows[: len(ours)]]
    assert ours[0].own == pytest.approx(100 * comparison.teacher.exact_match) and ours[0].parameters == 1_204_880
    assert {row.parameters for row in ours[1:]} == {301_220}
    assert all(row.own is None for row in board.rows if not row.ours)
    best = comparison.arms[comparison.order[0]].exact_match
    assert ours[1].gain_sft == pytest.approx(100 * (best / comparison.arms["sft"].exact_match - 1), abs=0.3)
    sft = next(row for row in ours if row.name == "sft")
    assert sft.gain_sft is None and sft.gain_kd is not None


def test_what_was_not_measured_is_a_dash(board: Leaderboard, finished: Finished) -> None:
    for row in board.rows:
        assert (row.tokens_per_second, row.first_token_ms, row.memory_mib) == (None, None, None)
        assert list(cells(row, board.noise).values())[-3:] == ["\N{EN DASH}"] * 3
    assert "not measured: `alignti leaderboard --measure` does" in markdown(board)
    _, comparison, study = finished
    timed = build(comparison, INDEX, TEACHER, study, SpeedReport(questions=250, models={"teacher": SPEED, "kd": SPEED}))
    speed_cells = {row.name: list(cells(row, timed.noise).values())[-3:] for row in timed.rows if row.ours}
    assert speed_cells["teacher"] == speed_cells["kd"] == ["512", "12.3", "6"]
    assert speed_cells["sft"] == ["\N{EN DASH}"] * 3
    assert "250 questions to each model in one run on cpu" in markdown(timed)


def test_a_speed_is_not_shown_for_a_model_trained_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert speed.read({}.get) is None
    SpeedReport(questions=9, models={"teacher": SPEED, "kd": SPEED, "gone": SPEED}).write(speed.SPEED)
    kept = speed.read({"teacher": SPEED.model, "kd": "6" * 64}.get)
    assert kept is not None and list(kept.models) == ["teacher"]
    speed.SPEED.write_text('{"questions": 9, "models": {"kd": {"device": "cpu"}}}')  # of a version that named no model
    assert speed.read({}.get) is None


def test_a_kit_s_scores_stand_in_the_paper_s_columns(board: Leaderboard, finished: Finished) -> None:
    _, comparison, study = finished
    kit = {
        "GQA_TestDev_Balanced/Overall": 51.2,
        "POPE, blank images/Overall/Overall": 50,
        "MME (file 0, not the kit's)/perception": 9,
    }
    partly = build(comparison, INDEX, TEACHER, study, None, {"kd": kit})
    row = next(r for r in partly.rows if r.ours and r.name == "kd")
    assert row.scores["gqa"] == 51.2 and row.scores["pope"] is row.scores["mme"] is row.average is None
    assert KIT_NOTE in partly.notes and KIT_NOTE not in board.notes
    kit |= {"ScienceQA_TEST/test/Overall": 0.5, "TextVQA_VAL/Overall": 40, "POPE/Overall/Overall": 80, "POPE/Overall/acc": 70}
    kit |= {"MME/perception": 1000, "MME/cognition": 200, "MMBench_DEV_EN/dev/Overall": 0.25}
    row = next(r for r in build(comparison, INDEX, TEACHER, study, None, {"kd": kit}).rows if r.ours and r.name == "kd")
    assert list(row.scores.values()) == [51.2, 50, 40, 80, 50, 25] and row.average == pytest.approx(296.2 / 6)


def test_a_comparison_of_another_recipe_is_told(finished: Finished) -> None:
    _, comparison, study = finished
    for other, known in (({}, INDEX), (study, INDEX.model_copy(update={"students": {}}))):
        with pytest.raises(DataError, match=rf"compare.json has the arm {comparison.order[0]}, .*; `dvc repro`"):
            build(comparison, known, TEACHER, other, None)


def test_noise_beside_each_benchmark(board: Leaderboard) -> None:
    assert board.noise["gqa"] == pytest.approx(1.2, abs=0.05)  # 12,578 questions near 61%
    assert board.noise["sqa"] == pytest.approx(3.0, abs=0.05)  # 2,017 near 61%
    assert board.noise["mme"] is None and board.noise["mmb"] is None  # no shares of independent questions
    assert "GQA (±1.2)" in markdown(board)


def test_every_format_holds_every_row(board: Leaderboard) -> None:
    paths = write(board)
    assert [path.name for path in paths] == [f"leaderboard.{kind}" for kind in ("md", "csv", "html", "json")]
    assert Leaderboard.read(paths[3]) == board
    lines = list(csv.DictReader(paths[1].open()))
    assert [line["name"] for line in lines] == [row.name for row in board.rows]
    assert lines[0]["memory_mib"] == lines[-1]["own"] == ""
    (ours, _, own_rows), (_, header, published) = sections(board)
    assert board.own_questions in ours and (len(own_rows), len(published)) == (1 + len(ARMS), 18)
    assert "exact match, %" not in header and "average" in header, "a half has no column that it leaves empty"
    html = page(board)
    assert html.count('<tr class="ours') == 1 + len(ARMS)
    assert html.count('<tr class="published') == 18
    assert "src=" not in html and "href=" not in html  # fetches nothing
