"""Peak memory of a callable, on a GPU or a CPU."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Peak of torch's allocator while `work` runs, above its level before.

    On a CPU, torch's profiler tracks the allocator; scratch memory inside a kernel library is not counted. Memory allocated
    before and freed meanwhile is not subtracted.
    """
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - allocated
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's start and stop messages
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes().decode(errors="replace"))["traceEvents"]
    return max((event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"), default=0)


def peak_mib(model: nn.Module, work: Callable[[], Any]) -> float:
    """Weights and buffers of `model` plus the peak of `work`, MiB."""
    model_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return (model_bytes + peak_bytes(work, next(model.parameters()).device)) / 2**20
