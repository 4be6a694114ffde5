"""The table and the plot say what was chosen, why, and what it cost."""

from __future__ import annotations

import io

import pytest
from matplotlib.figure import Figure
from PIL import Image

from components.config.load import load_settings
from components.config.teacher import TeacherSettings
from components.records.teacher import Candidate, TeacherReport
from components.report.figures import DARK, LIGHT, draw
from components.teacher.choose import choose, limits_broken
from components.teacher.report import quality_cost, table


@pytest.fixture
def limits() -> TeacherSettings:
    return load_settings().teacher.model_copy(update={"max_parameters": 900_000, "min_exact_match": 0.5})


@pytest.fixture
def report(limits: TeacherSettings) -> TeacherReport:
    figures = [
        ("tiny", 0.42, 120_000, 3.1),
        ("small", 0.78, 310_000, 4.2),
        ("base", 0.87, 640_000, 6.5),
        ("large", 0.9, 1_400_000, 11.0),
    ]
    candidates = []
    for name, exact_match, parameters, seconds in figures:
        plain = Candidate(
            name=name,
            exact_match=exact_match,
            per_kind={"count": exact_match - 0.1, "exist": exact_match + 0.1},
            nats_per_token=0.5,
            irs=0.25,
            irs_layer=2,
            parameters=parameters,
            seconds_per_1000=seconds,
            memory_mib=50.0,
            refused=[],
        )
        candidates.append(plain.model_copy(update={"refused": limits_broken(plain, limits)}))
    chosen, reason = choose(candidates, limits)
    return TeacherReport(chosen=chosen, reason=reason, candidates=candidates)


def test_the_table_holds_every_figure_and_the_reason(report: TeacherReport, limits: TeacherSettings) -> None:
    lines = table(report, limits, samples=400).splitlines()
    assert lines[0] == "# Teacher: base"
    assert report.reason in lines
    assert "| exact match | 42.0% | 78.0% | 87.0% | 90.0% |" in lines
    assert "| parameters | 120,000 | 310,000 | 640,000 | 1,400,000 |" in lines
    assert "| IRS of its best layer | 0.250 (layer 2) | 0.250 (layer 2) | 0.250 (layer 2) | 0.250 (layer 2) |" in lines
    assert "| count | 32.0% | 68.0% | 77.0% | 80.0% |" in lines
    assert "| exist | 52.0% | 88.0% | 97.0% | 100.0% |" in lines
    (verdict,) = (line for line in lines if line.startswith("| verdict"))
    assert verdict == (
        "| verdict | exact match 0.420 is below min_exact_match 0.5 | within the limits | **chosen** "
        "| 1,400,000 parameters are above max_parameters 900,000 |"
    )
    assert any("400 validation samples" in line for line in lines)
    assert any("`max_parameters` 900,000" in line and "max_memory_mib" not in line for line in lines)


def test_the_plot_names_every_candidate_and_marks_the_chosen_one(report: TeacherReport, limits: TeacherSettings) -> None:
    figure: Figure = quality_cost(report, limits, 400, LIGHT)
    assert [axes.get_xlabel() for axes in figure.axes] == ["parameters, millions", "seconds per 1,000 samples"]
    for axes in figure.axes:
        words = [text.get_text() for text in axes.texts]
        assert [word for word in words if word.startswith(("tiny", "small", "base", "large"))] == [
            "tiny (refused)", "small", "base (chosen)", "large (refused)"
        ]  # fmt: skip
        low, high = axes.get_ylim()
        assert low < 42 and high > 90


def test_the_plot_without_a_limit_has_no_line_for_it(report: TeacherReport, limits: TeacherSettings) -> None:
    free = limits.model_copy(update={"min_exact_match": None})
    labels = [text.get_text() for axes in quality_cost(report, free, 400, LIGHT).axes for text in axes.texts]
    assert "min_exact_match" not in labels and "max_parameters" in labels
    assert "min_exact_match" not in table(report, free, samples=400).split("Limits:")[1].split("\n")[0]


def test_the_plot_is_the_same_bytes_every_time_and_a_picture(report: TeacherReport, limits: TeacherSettings) -> None:
    content = draw(quality_cost, report, limits, 400)
    assert content == draw(quality_cost, report, limits, 400) != draw(quality_cost, report, limits, 400, theme=DARK)
    assert Image.open(io.BytesIO(content)).width > 800
