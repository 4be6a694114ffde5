"""L_dkd: decoupled KD with a gate: KL of gold against all other tokens, and KL among the others. Units: response tokens.

`target` KL([p_y, 1 - p_y] || [q_y, 1 - q_y]) + `others` KL of both without y, times the row's weight over the sample's mean.
Source: GRACE, arXiv 2601.22709 (the gate); arXiv 2203.08679.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from components.align_ti.row_weights import over_mean, row_weights, weight_called
from components.align_ti.seen import Seen
from components.align_ti.terms import Needs, NonNegative, responses
from components.align_ti.top_k import decoupled


@dataclass(frozen=True)
class Term:
    target: NonNegative = 1.0
    others: NonNegative = 2.0
    row_weight: str | None = "certainty"  # a function of align_ti/row_weights.py; None: uniform
    needs = Needs(live=True, gold=True)
    units = staticmethod(responses)

    def __post_init__(self) -> None:
        if self.row_weight is not None:
            weight_called(self.row_weight)

    def loss(self, seen: Seen) -> Tensor:
        def of_row(at: slice, teacher: Tensor, student: Tensor) -> Tensor:
            of_gold, among, _ = decoupled(teacher, student, seen.gold[at, None])
            return self.target * of_gold + self.others * among

        weights = seen.ones(seen.gold)
        if self.row_weight is not None:
            weights = over_mean(row_weights(seen, self.row_weight), seen.sample)
        return seen.rowwise(seen.predicts, of_row, weights)
