"""Samples of mixed length: every arm learns the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import mixed, table
from benchmarks.shapes import IMAGE, collate, trl_inputs
from tests.benchmarks.test_step import CPU, SMALLEST

SIZE = replace(SMALLEST, batch=2, teacher=replace(SMALLEST.teacher, vocabulary=40))


def test_passes_by_length_learn_the_same_with_less_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "STEP", 12)
    monkeypatch.setattr(mixed, "PASS", 4)
    monkeypatch.setattr(mixed, "VISUAL", 60)
    result = mixed.run(SIZE, CPU, steps=1, repeats=1)
    by_length, equal = (result["arms"][name] for name in ("by length", "equal"))
    assert 0 < by_length["padding"] < equal["padding"] < 1 and result["ratios"]["mixed_vs_equal"] > 0
    assert "| by length |" in table.report(result)


def test_arms_that_learn_something_else_stop_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "STEP", 4)
    monkeypatch.setattr(mixed, "split_batch", lambda step, *_: [step[:2]])
    with pytest.raises(AssertionError, match="equal: loss"):
        mixed.run(SIZE, CPU, steps=1, repeats=1)


def test_kinds_come_in_their_shares_and_trl_gets_the_same_tokens() -> None:
    stream = mixed.samples(mixed.MIXED, 400)
    assert sum(sample.pixels is None for sample in stream) == pytest.approx(0.06 * 400, abs=12)
    few = stream[:6]
    ours, trl = collate(few), trl_inputs(few, 1, CPU)
    assert int(trl["completion_mask"].sum()) == int(ours.response.sum()) == sum(len(s.answer) for s in few)
    assert int(trl["prompt_mask"].sum()) == int((ours.attention_mask.bool() & ~ours.response).sum())
    assert int((trl["prompt_ids"] == IMAGE).sum()) == int(ours.visual.sum())
