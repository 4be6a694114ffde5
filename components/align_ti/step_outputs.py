"""Intermediate results of one training step, shared by the loss terms and computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from components.align_ti.batch import Batch, answers, predicting
from components.align_ti.cached import Cached, Rows, cached_row_divergence
from components.align_ti.divergence import Divergence, row_divergence
from components.align_ti.head import CHUNK_MIB, Head, at_least_float32, row_losses, rows_per_chunk
from components.align_ti.ribbon import Ribbon
from components.align_ti.watch import Watched

Rowwise = Callable[[slice, Tensor, Tensor], Tensor]  # slice of rows, teacher and student logits (n, V) -> (n,)


@dataclass
class StepOutputs:
    """Forward results of one step over a batch.

    Hidden states are the head's inputs: (B, T, d) for the sequence, (M, d) for the ribbon's rows, None if no term needs
    them. Teacher states carry no gradient.
    """

    batch: Batch
    student: Tensor
    student_head: Head
    keys: list[int] = field(default_factory=list)  # seed of each sample's draws
    teacher: Tensor | Cached | None = None  # Cached under `teacher_signals.source: cache`
    teacher_head: Head | None = None
    attention: Tensor | None = None  # (B, Nv) teacher attention that weights visual tokens
    in_student: Watched = field(default_factory=Watched)
    in_teacher: Watched = field(default_factory=Watched)
    views: dict[str, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)  # student and teacher (B, T, d)
    edited: Tensor | None = None  # (n, T, d) student hidden states of the edited samples
    ribbon: Ribbon | None = None
    student_ribbon: Tensor | None = None
    teacher_ribbon: Tensor | None = None
    default_divergence: Divergence = field(default_factory=Divergence)
    shared_vocabulary: int | None = None
    chunk_mib: float = CHUNK_MIB
    progress: float = 0.0  # training progress: 0 at the first step, towards 1 at the last
    diagnostics: dict[str, Tensor] = field(default_factory=dict)  # logged metrics: sums over the batch's images
    teacher_constants: dict[str, Tensor] = field(default_factory=dict)  # computed once a run from the frozen teacher, by name
    modules: Mapping[str, nn.Module] = field(default_factory=dict)  # trained modules of terms, by term name
    _text_divergences: dict[Divergence, Tensor] = field(default_factory=dict, init=False)

    @cached_property
    def shared(self) -> int | None:
        """Number of columns that both heads share; None under a cached teacher if all of them are."""
        if self.shared_vocabulary is not None or self.teacher_head is None:
            return self.shared_vocabulary
        return min(len(self.student_head.weight), len(self.teacher_head.weight))

    @cached_property
    def zero(self) -> Tensor:
        """Zero attached to the graph, so that a batch without units has a backward pass."""
        return self.student.sum(dtype=at_least_float32(self.student.dtype)) * 0.0

    @cached_property
    def response_rows(self) -> Tensor:
        """(B, T) bool: the rows that predict the response."""
        return predicting(self.batch.response)

    @cached_property
    def gold(self) -> Tensor:
        """(N,) response tokens, the targets of the rows in `response_rows`."""
        return self.batch.input_ids[:, 1:][self.batch.response[:, 1:]]

    @cached_property
    def sample(self) -> Tensor:
        """(N,) sample index of each row in `response_rows`: of a conversation, all answers together."""
        return self.response_rows.nonzero()[:, 0]

    @cached_property
    def answer(self) -> Tensor:
        """(N,) answer that each row in `response_rows` belongs to, numbered over the batch."""
        return answers(self.response_rows)

    @cached_property
    def text_rows(self) -> Tensor:
        """(B, T) bool: rows of the sequence that enter L_kd or L_tpa."""
        return self.response_rows if self.ribbon is None else self.response_rows | (self.ribbon.gold > 0)

    def text_divergence(self, divergence: Divergence | None = None) -> Tensor:
        """(N,) divergence at `text_rows`, memoised per `Divergence`."""
        options = divergence or self.default_divergence
        if options not in self._text_divergences:
            self._text_divergences[options] = self.divergence(self.text_rows, divergence=options)
        return self._text_divergences[options]

    def divergence(self, rows: Tensor, weights: Tensor | None = None, divergence: Divergence | None = None) -> Tensor:
        """(N,) divergence at the rows of a (B, T) bool mask; with `weights` (N,), their weighted sum ()."""
        return self._divergence(self.teacher_at(rows), self.student[rows], divergence, weights)

    def ribbon_divergence(self, divergence: Divergence | None = None) -> Tensor:
        """(M,) divergence at the ribbon's rows."""
        assert self.student_ribbon is not None and self.teacher_ribbon is not None
        return self._divergence(self.teacher_ribbon, self.student_ribbon, divergence)

    def rowwise(self, rows: Tensor, loss: Rowwise, weights: Tensor | None = None) -> Tensor:
        """(N,) or (N, k) function of both models' logits at the rows of a (B, T) bool mask, computed in chunks of rows.

        With `weights` (N,), the weighted sum (), without recomputing logits in the backward pass. Requires `live` in the
        term's needs.
        """
        teacher_rows, head = self.teacher_at(rows), self.teacher_head
        assert isinstance(teacher_rows, Tensor) and head is not None, "a term that reads whole logits says `live` in its needs"

        def chunk_loss(chunk: slice, student: Tensor) -> Tensor:
            with torch.no_grad():
                teacher = head(teacher_rows[chunk])[:, : self.shared]
            return loss(chunk, teacher, student[:, : self.shared])

        size = rows_per_chunk(max(len(head.weight), len(self.student_head.weight)), self.chunk_mib)
        return row_losses(self.student[rows], self.student_head, chunk_loss, size, weights)

    def ones(self, like: Tensor) -> Tensor:
        """(N,) unit weights for `rowwise` and `divergence`."""
        return torch.ones(len(like), dtype=self.zero.dtype, device=self.student.device)

    def teacher_at(self, rows: Tensor) -> Tensor | Rows:
        """Teacher hidden states (N, d), or cached rows, at a (B, T) bool mask."""
        assert self.teacher is not None, "a term that reads the teacher says so in its needs"
        return self.teacher.at(rows) if isinstance(self.teacher, Cached) else self.teacher[rows]

    def _divergence(
        self,
        teacher_rows: Tensor | Rows,
        student_rows: Tensor,
        divergence: Divergence | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        options = divergence or self.default_divergence
        common: dict[str, Any] = {"shared": self.shared_vocabulary, "weights": weights, "chunk_mib": self.chunk_mib}
        if not isinstance(teacher_rows, Tensor):
            return cached_row_divergence(
                teacher_rows, student_rows, self.student_head, temperature=options.temperature, **common
            )
        assert self.teacher_head is not None
        return row_divergence(teacher_rows, self.teacher_head, student_rows, self.student_head, **asdict(options), **common)
