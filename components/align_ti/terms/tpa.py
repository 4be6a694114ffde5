"""L_tpa: divergence one step after each alternative that counts. Units: counted draws.

A draw equal to the gold token uses its row of the plain pass; the others use the ribbon's rows, one per distinct draw.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from components.align_ti.batch import Batch
from components.align_ti.divergence import Divergence
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, responses


@dataclass(frozen=True)
class Term:
    divergence: Divergence | None = None  # None: the arm's
    needs = Needs(response=False, ribbon=True)

    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        return responses(batch) * 0 if draws is None else draws

    def loss(self, outputs: StepOutputs) -> Tensor:
        ribbon = outputs.ribbon
        assert ribbon is not None
        text_divergence = outputs.text_divergence(self.divergence)
        ribbon_divergence = outputs.ribbon_divergence(self.divergence)
        multiplicity = ribbon.multiplicity[ribbon.valid]
        return (ribbon.gold[outputs.text_rows] * text_divergence).sum() + (multiplicity * ribbon_divergence).sum()
