"""L_sft: cross-entropy with the response tokens as targets. Units: response tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from components.align_ti.head import cross_entropy
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, responses


@dataclass(frozen=True)
class Term:
    needs = Needs(teacher=False, gold=True)
    units = staticmethod(responses)

    def loss(self, outputs: StepOutputs) -> Tensor:
        return cross_entropy(outputs.student[outputs.response_rows], outputs.student_head, outputs.gold, outputs.chunk_mib)
