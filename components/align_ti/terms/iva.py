"""L_iva: divergence at the visual rows, weighted by the attention from the instruction to each. Units: images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge
from torch import Tensor

from components.align_ti.batch import scatter_visual
from components.align_ti.divergence import Divergence
from components.align_ti.row_weights import row_weights
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, images
from components.align_ti.visual_weights import Change, changed, concentration, sampled, uniform_attention, visual_weights


@dataclass(frozen=True)
class Term:
    uniform: bool = False  # control: uniform weights within an image
    by: Literal["entropy", "divergence"] | None = None  # control: weights from a function of align_ti/row_weights.py
    divergence: Divergence | None = None  # None: the arm's
    change: Change | None = None  # control: permuted weights, or weights with or without sinks
    rows: Annotated[int, Ge(1)] | None = None  # systematic draws of visual rows per image, by weight; None: all rows
    units = staticmethod(images)

    @property
    def needs(self) -> Needs:
        return Needs(response=False, visual=True, attention=not self.uniform and self.by is None, live=self.by is not None)

    def loss(self, outputs: StepOutputs) -> Tensor:
        visual = outputs.batch.visual
        if not bool(visual.any()):
            return outputs.zero
        pictures = outputs.batch.pictures
        if self.by is not None:
            attention: Tensor | None = scatter_visual(row_weights(outputs, self.by, visual=True), pictures)
        else:
            attention = uniform_attention(pictures) if self.uniform else outputs.attention
        assert attention is not None  # guaranteed by `needs`
        if self.change is not None:
            attention = changed(attention, pictures, outputs.batch.ids, self.change)
        weights = visual_weights(attention, pictures)
        outputs.diagnostics |= {f"iva/{name}": sum.detach() for name, sum in concentration(weights, pictures).items()}
        if self.rows is not None:
            visual, weights = sampled(weights, pictures, outputs.keys, self.rows)
            outputs.diagnostics["iva/rows"] = weights.new_tensor(len(weights))
        return outputs.divergence(visual, weights, self.divergence)
