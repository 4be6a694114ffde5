"""L_taid: KL from an interpolated teacher, softmax((1 - t) sg(z_S) + t z_T), sg stop-gradient. Units: response tokens.

t rises from `start` with training progress, faster while the loss falls. Source: TAID, arXiv 2501.16937.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components.align_ti.divergence import divergence
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, NonNegative, Ratio, responses


class Interpolation(nn.Module):
    """Interpolation coefficient t with its momentum and last loss, as buffers, so that checkpoints hold them."""

    t: Tensor
    momentum: Tensor
    before: Tensor

    def __init__(self, start: float, pace: float) -> None:
        super().__init__()
        self.start, self.pace = start, pace
        for name, value in {"t": start, "momentum": 0.0, "before": 0.0}.items():  # before: loss of the previous step
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def stepped(self, loss: Tensor, progress: float) -> None:
        faster = self.t
        if self.before > 0:
            self.momentum.mul_(0.99).add_(0.01 * (self.before - loss) / self.before)
            faster = self.t + self.pace * self.momentum.sigmoid() * (1 - self.t)
        self.t.copy_(faster.clamp(self.start + (1 - self.start) * progress, 1.0))
        self.before.copy_(loss)


@dataclass(frozen=True)
class Term:
    start: Ratio = 0.4
    pace: NonNegative = 5e-4  # 0: t follows training progress alone
    needs = Needs(live=True)
    units = staticmethod(responses)

    def module(self, student_width: int, teacher_width: int | None) -> nn.Module:
        return Interpolation(self.start, self.pace)

    def loss(self, outputs: StepOutputs) -> Tensor:
        t: Any = outputs.modules["taid"].t

        def row_loss(chunk: slice, teacher: Tensor, student: Tensor) -> Tensor:
            return divergence((1 - t) * student.detach() + t * teacher, student)

        return outputs.rowwise(outputs.response_rows, row_loss, outputs.ones(outputs.gold))
