"""L_sft: cross-entropy with the response tokens as targets. Units: response tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from components.align_ti.head import cross_entropy
from components.align_ti.seen import Seen
from components.align_ti.terms import Needs, responses


@dataclass(frozen=True)
class Term:
    needs = Needs(teacher=False, gold=True)
    units = staticmethod(responses)

    def loss(self, seen: Seen) -> Tensor:
        return cross_entropy(seen.student[seen.predicts], seen.student_head, seen.gold, seen.chunk_mib)
