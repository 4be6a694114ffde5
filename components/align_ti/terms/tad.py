"""L_tad: KL over the teacher's `top` tokens plus the residual mass, and weighted KL within the rest. Units: response tokens.

KL(p_T || p_S) = D1 + a D2, a the residual mass under p_T; here D1 + beta a / mean(a) D2, the mean over a sample's rows.
Source: TAD, arXiv 2602.20816.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from components.align_ti.row_weights import over_mean
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, NonNegative, responses
from components.align_ti.top_k import decoupled


@dataclass(frozen=True)
class Term:
    top: Annotated[int, Ge(1)] = 10  # at most all tokens but one
    beta: NonNegative = 2.0
    needs = Needs(live=True)
    units = staticmethod(responses)

    def loss(self, outputs: StepOutputs) -> Tensor:
        def row_terms(chunk: slice, teacher: Tensor, student: Tensor) -> Tensor:
            return torch.stack(decoupled(teacher, student, teacher.topk(min(self.top, teacher.shape[-1] - 1)).indices), dim=-1)

        top_divergence, tail_divergence, tail_mass = outputs.rowwise(outputs.response_rows, row_terms).unbind(-1)
        return (top_divergence + self.beta * over_mean(tail_mass.detach(), outputs.sample) * tail_divergence).sum()
