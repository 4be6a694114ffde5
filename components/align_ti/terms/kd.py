"""L_kd: divergence at the rows that predict the response, uniform or weighted by `row_weight`. Units: response tokens, plus
visual tokens if pooled."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from components.align_ti.batch import Batch
from components.align_ti.divergence import Divergence
from components.align_ti.row_weights import in_top, over_mean, row_weights, weight_called
from components.align_ti.seen import Seen
from components.align_ti.terms import Needs, Share, responses


@dataclass(frozen=True)
class Term:
    divergence: Divergence | None = None  # None: the arm's
    row_weight: str | None = None  # a function of align_ti/row_weights.py
    top: Share | None = None  # share of each sample's rows kept, by highest weight, then weighted uniformly
    pooled: bool = False  # control: visual rows too, all rows in one mean

    def __post_init__(self) -> None:
        if self.row_weight is not None:
            weight_called(self.row_weight)
        if self.top is not None and self.row_weight is None:
            raise ValueError("top is a share of the rows that a row_weight ranks: give one")

    @property
    def needs(self) -> Needs:
        return Needs(live=self.row_weight is not None, visual=self.pooled)

    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        return responses(batch) + batch.visual.sum() if self.pooled else responses(batch)

    def loss(self, seen: Seen) -> Tensor:
        return self._at_response(seen) + self._at_images(seen) if self.pooled else self._at_response(seen)

    def _at_images(self, seen: Seen) -> Tensor:
        rows = seen.batch.visual
        return seen.divergence(rows, seen.ones(seen.batch.input_ids[rows]), self.divergence) if bool(rows.any()) else seen.zero

    def _at_response(self, seen: Seen) -> Tensor:
        if self.row_weight is None:
            return seen.text_divergence(self.divergence)[seen.predicts[seen.text_rows]].sum()
        weights = row_weights(seen, self.row_weight)
        if self.top is not None:
            weights = over_mean(in_top(weights, seen.sample, self.top).to(weights.dtype), seen.sample)
        return seen.divergence(seen.predicts, weights, self.divergence)
