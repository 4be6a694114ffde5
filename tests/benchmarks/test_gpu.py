"""What a GPU has to show: what differs is told, and a part that is cut off keeps what it found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import gpu


def test_a_part_that_is_cut_off_keeps_the_paths_that_it_came_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(command: list[str], **_: Any) -> None:
        gpu.write_text(gpu.Path(command[command.index("--json") + 1]), '{"compiled layers": {"equal": true}}')
        raise gpu.subprocess.TimeoutExpired(command, 5)

    monkeypatch.setattr(gpu.subprocess, "run", cut)
    result = gpu._process("equality", True, 5)
    assert result == {"compiled layers": {"equal": True}, "cut_off": "after 5 s, its share of the time"}
    assert not gpu.failed(result) and gpu.failed({"a path": {"equal": False}})


def test_a_path_that_differs_or_raises_is_told() -> None:
    a, b = [torch.ones(3)], [torch.tensor([1.0, 1.0, 0.0])]
    assert gpu.relative_error(a, a) == 0 and gpu.relative_error(a, b) == pytest.approx(0.5**0.5)
    assert gpu.failed({"error": "the process ended with 1"}) and not gpu.failed({"skipped": "no time"})
