"""Tensor memory against known sizes, and against the allocator's own record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from components.teacher.memory import TensorMemory

KIB = 2**10


def work(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model(torch.ones(32, 64))


@pytest.fixture
def model() -> torch.nn.Module:
    """Weights of 64 x 256 and 256 x 64 float32."""
    return torch.nn.Sequential(torch.nn.Linear(64, 256, bias=False), torch.nn.ReLU(), torch.nn.Linear(256, 64, bias=False))


def test_the_peak_is_weights_and_what_is_alive_together(model: torch.nn.Module) -> None:
    with TensorMemory(model) as memory:
        work(model)
    weights, entered, hidden = 128 * KIB, 8 * KIB, 32 * KIB  # hidden: before and after the ReLU, alive together
    assert memory.peak == weights + entered + 2 * hidden


def test_freed_tensors_do_not_add_up(model: torch.nn.Module) -> None:
    with TensorMemory(model) as once:
        work(model)
    with TensorMemory(model) as often:
        for _ in range(10):
            work(model)
    assert once.peak == often.peak


def test_views_and_writes_in_place_take_nothing() -> None:
    with TensorMemory(torch.nn.Identity()) as memory:
        table = torch.zeros(KIB)
        table.view(32, 32).t()[3:].add_(1)
    assert memory.peak == 4 * KIB


def test_inference_mode_is_counted_too() -> None:
    with TensorMemory(torch.nn.Identity()) as memory, torch.inference_mode():
        torch.zeros(KIB)
    assert memory.peak == 4 * KIB


def test_it_agrees_with_the_allocators_record(model: torch.nn.Module, tmp_path: Path) -> None:
    with TensorMemory(model) as memory:
        work(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work(model)
    trace.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: (e["ts"], e["args"]["Ev Idx"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    assert memory.peak - 128 * KIB == pytest.approx(peak, rel=0.01)
