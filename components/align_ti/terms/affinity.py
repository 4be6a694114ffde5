"""L_affinity: smooth L1 between teacher and student cosine matrices (visual x text tokens). Units: samples with an image.

Cosines of last hidden states; text tokens are instruction and response; the mean is over a sample's Nv x Nt entries. Source:
EM-KD, arXiv 2511.21106.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from components.align_ti.batch import Batch
from components.align_ti.head import at_least_float32
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs


@dataclass(frozen=True)
class Term:
    needs = Needs(response=False, live=True)

    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        return (batch.visual.any(1) & _text(batch).any(1)).sum().float()

    def loss(self, outputs: StepOutputs) -> Tensor:
        assert isinstance(outputs.teacher, Tensor)  # guaranteed by `needs`
        visual, text = outputs.batch.visual, _text(outputs.batch)
        losses = [outputs.zero]
        for i in (visual.any(1) & text.any(1)).nonzero()[:, 0].tolist():
            student, teacher = (
                _cosines(states[i][visual[i]], states[i][text[i]]) for states in (outputs.student, outputs.teacher)
            )
            losses.append(F.smooth_l1_loss(student, teacher))
        return torch.stack(losses).sum()


def _cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """(N, M) cosine matrix of (N, d) and (M, d) states."""
    with torch.autocast(rows.device.type, enabled=False):
        a, b = (F.normalize(states.to(at_least_float32(states.dtype)), dim=-1) for states in (rows, columns))
        return a @ b.T


def _text(batch: Batch) -> Tensor:
    return batch.instruction | batch.response
