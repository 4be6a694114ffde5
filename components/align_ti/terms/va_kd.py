"""L_va_kd: L_kd in which the most image-dependent response tokens carry half of the weight. Units: response tokens.

Source: VA-OPD, arXiv 2605.21924, here on the data's answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from components.align_ti.divergence import Divergence
from components.align_ti.image_dependence import EDITS, image_dependence
from components.align_ti.row_weights import in_top, over_mean, random_priority, row_weights
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, Share, View, responses


@dataclass(frozen=True)
class Term:
    share: Share = 0.2  # share of each sample's response tokens that carry half of the weight
    by: Literal["blurred", "blank", "entropy", "random"] = "blurred"  # which edit of the image; or controls without one
    cached: bool = False  # image dependence from the teacher's evidence, in place of one more teacher pass per step
    divergence: Divergence | None = None  # None: the arm's
    units = staticmethod(responses)

    def __post_init__(self) -> None:
        if self.cached and self.by not in EDITS:
            raise ValueError(f"`cached` is for `by: {' | '.join(EDITS)}`, and {self.by} takes no pass that could be cached")

    @property
    def needs(self) -> Needs:
        if self.cached:
            return Needs(gold=True, evidence=frozenset({self.by}))
        views = (View(self.by, EDITS[self.by], student=False),) if self.by in EDITS else ()
        return Needs(live=True, views=views)

    def loss(self, outputs: StepOutputs) -> Tensor:
        top = in_top(self._priority(outputs), outputs.sample, self.share)
        halves = over_mean(top.double(), outputs.sample) + over_mean((~top).double(), outputs.sample)
        weights = over_mean(halves, outputs.sample)  # 1 for a sample of one response token
        weights = torch.where(outputs.batch.visual.any(1)[outputs.sample], weights, 1.0).to(outputs.zero.dtype)
        return outputs.divergence(outputs.response_rows, weights, self.divergence)

    def _priority(self, outputs: StepOutputs) -> Tensor:
        """(N,) by which response tokens are chosen."""
        if self.by == "entropy":
            return row_weights(outputs, "entropy")
        if self.by == "random":
            return random_priority(outputs)
        if self.cached:
            assert outputs.batch.dependence is not None  # guaranteed by `needs`
            return outputs.batch.dependence[outputs.batch.response]
        head, rows, (_, edited_hidden) = outputs.teacher_head, outputs.response_rows, outputs.views[self.by]
        assert isinstance(outputs.teacher, Tensor) and edited_hidden is not None and head is not None  # guaranteed by `needs`
        shared, chunk_mib = outputs.shared, outputs.chunk_mib
        return image_dependence(head, outputs.teacher[rows], edited_hidden[rows], outputs.gold, shared, chunk_mib)
