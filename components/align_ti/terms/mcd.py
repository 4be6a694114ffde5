"""L_mcd: total variation between student and teacher under counterfactual edits of the input. Units: edited samples.

Evidence: the words and visual tokens that the teacher's answer depends on most (teacher_cache). Each edit, with probability
1/2, either replaces everything but the evidence by another sample's, with target p_T; or replaces the evidence, with the
teacher's change of p as the target of the student's. Source: MCD, arXiv 2609.39920, its form for one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from components.align_ti.batch import Batch, edits_of, predicting
from components.align_ti.head import row_losses, rows_per_chunk
from components.align_ti.seen import Seen
from components.align_ti.terms import Needs, Share
from components.align_ti.top_k import with_rest


@dataclass(frozen=True)
class Term:
    evidence: Literal["gradient", "random"] = "gradient"  # random: control
    verified: Share | None = 0.5  # share of samples edited, by largest effect of their evidence on the teacher; None: all
    needs = Needs(teacher=False, gold=True, edits=True)

    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        edits = edits_of(batch)
        return batch.response.sum().float() * 0 if edits is None else edits.batch.response.any(1).sum().float()

    def loss(self, seen: Seen) -> Tensor:
        edits, hidden = edits_of(seen.batch), seen.edited
        if edits is None or hidden is None:
            return seen.zero
        rows = predicting(edits.batch.response)
        of = rows.nonzero()[:, 0]
        effect = edits.effect[of]
        unedited = seen.student[edits.places][predicting(seen.batch.response[edits.places])]
        moved = self._probabilities(seen, hidden[rows], edits.tokens)
        before = self._probabilities(seen, unedited[effect], edits.tokens[effect])
        kept = (edits.whole - moved)[~effect].abs().sum(-1) / 2
        changed = ((edits.whole - edits.without)[effect] - (before - moved[effect])).abs().sum(-1) / 4
        mean = 1 / rows.sum(1)[of].to(moved.dtype)  # weights of a mean over an answer's rows
        return (mean[~effect] * kept).sum() + (mean[effect] * changed).sum() + hidden.sum() * 0.0

    @staticmethod
    def _probabilities(seen: Seen, rows: Tensor, tokens: Tensor) -> Tensor:
        """(N, W + 1) student probabilities of `tokens` (N, W) plus the residual mass, at hidden rows (N, d)."""
        head = seen.student_head

        def of_chunk(at: slice, logits: Tensor) -> Tensor:
            return with_rest(logits[:, : seen.shared_vocabulary].softmax(-1), tokens[at])

        return row_losses(rows, head, of_chunk, rows_per_chunk(len(head.weight), seen.chunk_mib))
