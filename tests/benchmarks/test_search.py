"""The benchmarks of searching, preparing and loading, on shapes of nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import loading, prepare, search, signals, table
from benchmarks.shapes import SIZES
from tests.benchmarks.test_step import CPU, SMALLEST


def test_search_result_has_its_fields_and_sees_what_eager_maps_see() -> None:
    result = search.run(SMALLEST, CPU, repeats=2)
    assert result["difference_from_eager"] < 1e-5
    assert {"search_vs_plain", "memory_search_vs_plain", "eager_vs_plain"} <= result["ratios"].keys()
    assert "pairs/s" in table.report(result)


def test_a_search_that_sees_something_else_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.Ways, "search", lambda self: torch.zeros(2, len(self.batch.input_ids), 4))
    with pytest.raises(AssertionError, match="differ by"):
        search.run(SMALLEST, CPU, repeats=2)


def test_prepare_results_have_their_fields() -> None:
    memory = prepare.memory([120, 160])
    assert memory["arms"]["160 rows"]["peak_mib"] > 5 and 0.5 < memory["ratios"]["memory_of_prepare"] < 2
    result = prepare.rate(images=60, copies=1, repeats=1)
    assert result["ratios"]["prepare_rate_vs_pillow"] > 0
    assert result["arms"]["pillow"]["images_per_second"] > 0
    assert "images/s" in table.report(result)


def test_a_step_on_batches_in_memory_waits_for_none_and_the_loader_s_rate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LOADERS", (0,))
    monkeypatch.setattr(prepare, "COPIES", 1)
    result = loading.run(SMALLEST, 2, CPU)
    in_memory, in_process = result["arms"]["in memory"], result["arms"]["0 loaders"]
    assert in_memory["share_waited"] < in_process["share_waited"] < 1
    assert result["arms"]["loading alone, one process"]["images_per_second"] > 1
    assert result["ratios"].keys() == {"loading_vs_memory", "loading_waited"}


def test_gradients_from_a_cache_are_compared_with_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "small", replace(SMALLEST, teacher=replace(SMALLEST.teacher, vocabulary=40)))
    monkeypatch.setattr(signals, "STEPS", 2)
    monkeypatch.setattr(signals, "CUTS", (2, 40))
    student, teacher, batch, shared, _ = signals.small()
    arms = signals.run("small", (student, teacher, batch, shared, 2), row_draws=20)["arms"]
    for rows in ("text", "visual"):
        exact, cut, drawn = (arms[f"{rows}: {way}"] for way in ("top 40 + tail", "top 2 + tail", f"{signals.DRAWS} draws"))
        assert exact["angle"] < 0.01 < drawn["angle"] < cut["angle"] and drawn["norm"] == pytest.approx(1, abs=0.1)
    noise = arms["iva.rows: 2, 3 samples, 20 draws"]
    assert 0 < noise["noise_of_mean"] < noise["noise"] / 2
