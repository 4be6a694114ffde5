"""Record of stage `distill`."""

from __future__ import annotations

from pydantic import PositiveInt

from components.records.record import Record


class Cost(Record):
    """artifacts/students/ARM/cost.json. Not deterministic, so only `compare` depends on it."""

    train_seconds: float
    step_seconds: float | None = None  # median over the steps, robust to other load on the machine; None: not recorded
    peak_memory_mib: float
    device: str
    steps: PositiveInt

    @property
    def seconds_per_step(self) -> float:
        return self.step_seconds or self.train_seconds / self.steps
