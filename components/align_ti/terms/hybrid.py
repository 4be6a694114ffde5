"""L_hybrid: mix of hard and soft targets, (1 - w) hard + w KL(p_T || p_S); replaces L_sft and L_kd. Units: response tokens.

With a `risk` the hard loss of an answer's row t = 0, 1, ... is discount^t (CE_t + risk/4 (z_t(y_t) - discount LSE(z_t+1))^2), z
the student's logits; the last row has no penalty. Source: Bridge-Garden, arXiv 2605.26246.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from components.align_ti.batch import index_within
from components.align_ti.divergence import divergence
from components.align_ti.row_weights import row_weight_function, row_weights
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, NonNegative, Ratio, responses


@dataclass(frozen=True)
class Term:
    soft: Ratio = 0.2  # w
    rising: bool = False  # linear warmup of w over the first fifth of the training
    row_weight: str | None = None  # w per row, a function of align_ti/row_weights.py; None: `soft`
    shuffled: bool = False  # control: each row has the weight of another row of its sample
    risk: NonNegative = 0.0
    discount: Ratio = 0.9999
    needs = Needs(live=True, gold=True)
    units = staticmethod(responses)

    def __post_init__(self) -> None:
        if self.row_weight is not None:
            row_weight_function(self.row_weight)
        elif self.shuffled:
            raise ValueError("shuffled: true needs a row_weight, whose values it shuffles")

    def loss(self, outputs: StepOutputs) -> Tensor:
        def row_terms(chunk: slice, teacher: Tensor, student: Tensor) -> Tensor:
            z = student.gather(1, outputs.gold[chunk, None])[:, 0]
            return torch.stack([z, student.logsumexp(-1), divergence(teacher, student)], dim=-1)

        z, lse, soft = outputs.rowwise(outputs.response_rows, row_terms).unbind(-1)
        hard = lse - z
        if self.risk and len(hard):
            same_answer = outputs.answer[1:] == outputs.answer[:-1]
            penalty = self.risk / 4 * (z[:-1] - self.discount * lse[1:]).square() * same_answer
            hard = hard + torch.cat([penalty, penalty.new_zeros(1)])
            hard = hard * self.discount ** index_within(outputs.answer).to(hard.dtype)
        w = row_weights(outputs, self.row_weight, shuffled=self.shuffled) if self.row_weight else self.soft
        if self.rising:
            w = w * min(1.0, outputs.progress / 0.2)
        return ((1 - w) * hard + w * soft).sum()
