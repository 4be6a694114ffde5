"""L_mcd: total variation between student and teacher under counterfactual edits of the input. Units: edited samples.

Evidence: the words and visual tokens that the teacher's answer depends on most (teacher_cache). Each edit, with probability
1/2, either replaces everything but the evidence by another sample's, with target p_T; or replaces the evidence, with the
teacher's change of p as the target of the student's. Source: MCD, arXiv 2609.39920, its form for one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from components.align_ti.batch import Batch, predicting
from components.align_ti.head import row_losses, rows_per_chunk
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, Share
from components.align_ti.top_k import with_residual


@dataclass(frozen=True)
class Term:
    evidence: Literal["gradient", "random"] = "gradient"  # random: control
    verified: Share | None = 0.5  # share of samples edited, by largest effect of their evidence on the teacher; None: all

    @property
    def needs(self) -> Needs:
        return Needs(teacher=False, gold=True, edits=True, evidence=frozenset({self.evidence}))

    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        edits = batch.edits
        return batch.response.sum().float() * 0 if edits is None else edits.batch.response.any(1).sum().float()

    def loss(self, outputs: StepOutputs) -> Tensor:
        edits, hidden = outputs.batch.edits, outputs.edited
        if edits is None or hidden is None:
            return outputs.zero
        rows = predicting(edits.batch.response)
        sample = rows.nonzero()[:, 0]
        effect = edits.effect[sample]
        plain_rows = outputs.student[edits.indices][predicting(outputs.batch.response[edits.indices])]
        edited = self._probabilities(outputs, hidden[rows], edits.tokens)
        unedited = self._probabilities(outputs, plain_rows[effect], edits.tokens[effect])
        kept_distance = (edits.whole - edited)[~effect].abs().sum(-1) / 2
        removed_distance = ((edits.whole - edits.without)[effect] - (unedited - edited[effect])).abs().sum(-1) / 4
        row_weight = 1 / rows.sum(1)[sample].to(edited.dtype)  # weights of a mean over an answer's rows
        return (row_weight[~effect] * kept_distance).sum() + (row_weight[effect] * removed_distance).sum() + hidden.sum() * 0.0

    @staticmethod
    def _probabilities(outputs: StepOutputs, rows: Tensor, tokens: Tensor) -> Tensor:
        """(N, W + 1) student probabilities of `tokens` (N, W) plus the residual mass, at hidden rows (N, d)."""
        head = outputs.student_head

        def chunk_probabilities(chunk: slice, logits: Tensor) -> Tensor:
            return with_residual(logits[:, : outputs.shared_vocabulary].softmax(-1), tokens[chunk])

        return row_losses(rows, head, chunk_probabilities, rows_per_chunk(len(head.weight), outputs.chunk_mib))
