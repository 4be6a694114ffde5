"""docs/performance.md says what the results say."""

from __future__ import annotations

import pytest

from benchmarks import table

RESULT = {
    "benchmark": "step",
    "size": "tiny",
    "about": "a pair",
    "machine": "2 CPU cores, no GPU",
    "date": "2026-11-22",
    "torch": "2.13",
    "clock": "CPU time",
    "repeats": 3,
    "ratios": {"align_ti_vs_kd": 1.1, "align_ti_vs_kd_worst": 1.7, "kd_vs_trl": 1.0},
    "quartiles": {"align_ti_vs_kd": [1.05, 1.2]},
    "arithmetic": {"align_ti_vs_kd_worst": 1.68},
    "arms": {"kd": {"seconds": 0.5, "tokens_per_second": 2000.0, "peak_mib": 10.0}},
    "not_measured": {"trl": "pip install trl==1.16.0"},
    "parts": {"kd": {"backward": 0.6, "optimiser": 0.4}},
}


def test_goals_are_marked_met_or_not() -> None:
    lines = {line.split("|")[1].strip(): line for line in table.render([RESULT]).splitlines() if line.count("|") == 5}
    assert "tiny **1.10** (1.05..1.20) ✓" in lines[table.GOALS[0].title]
    assert "tiny **1.70** ✗, arithmetic alone 1.68" in lines[table.GOALS[2].title]
    assert "not measured" in lines[table.GOALS[3].title]
    assert "≥ 1.20" in lines["KD-only tokens/s / TRL's trainer"] and "✗" in lines["KD-only tokens/s / TRL's trainer"]


def test_each_run_has_machine_date_arms_and_what_is_missing() -> None:
    text = table.render([RESULT])
    assert "A pair. 2 CPU cores, no GPU, 2026-11-22, torch 2.13, 3 interleaved repeats" in text
    assert "| kd | 0.5 | 2,000 | 10.0 |" in text
    assert "| trl | not measured: pip install trl==1.16.0 |" in text
    assert "- kd: backward 60%, optimiser 40%" in text


def test_only_what_stands_between_the_markers_changes() -> None:
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    once = table.refresh(page, "new")
    assert once == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter\n"
    assert table.refresh(once, "new") == once
    with pytest.raises(ValueError, match="once each"):
        table.refresh("no markers", "new")


def test_the_page_is_up_to_date() -> None:
    assert table.PAGE.read_text() == table.refresh(table.PAGE.read_text(), table.render(table.load()))
