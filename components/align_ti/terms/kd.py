"""L_kd: divergence at the rows that predict the response, alike or weighted by `row_weight`. Units: response tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from components.align_ti.batch import Batch
from components.align_ti.divergence import Divergence
from components.align_ti.row_weights import weight_called
from components.align_ti.seen import Seen
from components.align_ti.terms import Needs, responses


@dataclass(frozen=True)
class Term:
    divergence: Divergence | None = None  # None: the arm's
    row_weight: str | None = None  # a function of align_ti/row_weights.py

    def __post_init__(self) -> None:
        if self.row_weight is not None:
            weight_called(self.row_weight)

    @property
    def needs(self) -> Needs:
        return Needs(live=self.row_weight is not None)

    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        return responses(batch)

    def loss(self, seen: Seen) -> Tensor:
        if self.row_weight is None:
            return seen.text_divergence(self.divergence)[seen.predicts[seen.text_rows]].sum()
        weight, divergence = weight_called(self.row_weight), self.divergence or seen.divergence_of_arm
        targets = seen.batch.input_ids[:, 1:][seen.batch.response[:, 1:]]

        def weighted(at: slice, teacher: Tensor, student: Tensor) -> Tensor:
            return weight(teacher, student.detach(), targets[at]) * divergence(teacher, student)

        return seen.rowwise(seen.predicts, weighted, seen.ones(targets))
