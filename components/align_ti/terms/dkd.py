"""L_dkd: decoupled KD with a gate: KL of gold against all other tokens, and KL among the others. Units: response tokens.

`target` KL([p_y, 1 - p_y] || [q_y, 1 - q_y]) + `others` KL of both without y, times the row's weight over the sample's mean.
Source: GRACE, arXiv 2601.22709 (the gate); arXiv 2203.08679.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from components.align_ti.row_weights import over_mean, row_weight_function, row_weights
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, NonNegative, responses
from components.align_ti.top_k import decoupled


@dataclass(frozen=True)
class Term:
    target: NonNegative = 1.0
    others: NonNegative = 2.0
    row_weight: str | None = "certainty"  # a function of align_ti/row_weights.py; None: uniform
    shuffled: bool = False  # control: each row has the weight of another row of its sample
    needs = Needs(live=True, gold=True)
    units = staticmethod(responses)

    def __post_init__(self) -> None:
        if self.row_weight is not None:
            row_weight_function(self.row_weight)
        elif self.shuffled:
            raise ValueError("shuffled: true needs a row_weight, whose values it shuffles")

    def loss(self, outputs: StepOutputs) -> Tensor:
        def row_loss(chunk: slice, teacher: Tensor, student: Tensor) -> Tensor:
            target_kl, others_kl, _ = decoupled(teacher, student, outputs.gold[chunk, None])
            return self.target * target_kl + self.others * others_kl

        weights = outputs.ones(outputs.gold)
        if self.row_weight is not None:
            weights = over_mean(row_weights(outputs, self.row_weight, shuffled=self.shuffled), outputs.sample)
        return outputs.rowwise(outputs.response_rows, row_loss, weights)
