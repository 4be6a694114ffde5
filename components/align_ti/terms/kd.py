"""L_kd: divergence at the rows that predict the response, uniform or weighted by `row_weight`. Units: response tokens, plus
visual tokens if pooled."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from components.align_ti.batch import Batch
from components.align_ti.divergence import Divergence
from components.align_ti.row_weights import in_top, over_mean, row_weight_function, row_weights
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, Share, responses


@dataclass(frozen=True)
class Term:
    divergence: Divergence | None = None  # None: the arm's
    row_weight: str | None = None  # a function of align_ti/row_weights.py
    top: Share | None = None  # share of each sample's rows retained, by highest weight, then weighted uniformly
    pooled: bool = False  # control: visual rows too, all rows in one mean

    def __post_init__(self) -> None:
        if self.row_weight is not None:
            row_weight_function(self.row_weight)
        if self.top is not None and self.row_weight is None:
            raise ValueError("top is a share of the rows that a row_weight ranks: give one")

    @property
    def needs(self) -> Needs:
        return Needs(live=self.row_weight is not None, visual=self.pooled)

    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        return responses(batch) + batch.visual.sum() if self.pooled else responses(batch)

    def loss(self, outputs: StepOutputs) -> Tensor:
        loss, visual = self._response_loss(outputs), outputs.batch.visual
        if self.pooled and bool(visual.any()):
            loss = loss + outputs.divergence(visual, outputs.ones(outputs.batch.input_ids[visual]), self.divergence)
        return loss

    def _response_loss(self, outputs: StepOutputs) -> Tensor:
        if self.row_weight is None:
            return outputs.text_divergence(self.divergence)[outputs.response_rows[outputs.text_rows]].sum()
        weights = row_weights(outputs, self.row_weight)
        if self.top is not None:
            weights = over_mean(in_top(weights, outputs.sample, self.top).to(weights.dtype), outputs.sample)
        return outputs.divergence(outputs.response_rows, weights, self.divergence)
