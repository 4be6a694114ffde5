"""Cached teacher distributions of a batch, top-k or sampled, and their divergence from the student's, in chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from components.align_ti.head import CHUNK_MIB, Head, row_losses, rows_per_chunk
from components.align_ti.sampled import Sampled, sampled_divergence
from components.align_ti.top_k import TopK, top_k_divergence

Rows = TopK | Sampled


@dataclass(frozen=True)
class Cached:
    """Cached teacher rows of a batch. `index` (B, T) maps a position to its row in `rows`; -1: not cached."""

    rows: Rows
    index: Tensor

    def at(self, where: Tensor) -> Rows:
        """Rows at a (B, T) bool mask, ordered by (sample, position). Raises ValueError if one of them is not cached."""
        index = self.index[where]
        if bool((index < 0).any()):
            raise ValueError("the teacher's word is not kept for all the rows asked for")
        return self.rows[index]


def cached_divergence(teacher: Rows, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """(N,) divergence per row, in nats. `student_logits` (N, V) are cut to the shared vocabulary."""
    if isinstance(teacher, TopK):
        return top_k_divergence(teacher, student_logits, temperature)
    return sampled_divergence(teacher, student_logits, temperature)


def cached_row_divergence(
    teacher: Rows,
    student_rows: Tensor,
    student_head: Head,
    *,
    shared: int | None,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    chunk_mib: float = CHUNK_MIB,
) -> Tensor:
    """(N,) `cached_divergence` of hidden rows (N, d_S), in chunks of rows; with `weights` (N,), their weighted sum ().

    The student's head is cut to `shared` columns."""

    def of_chunk(at: slice, student_logits: Tensor) -> Tensor:
        return cached_divergence(teacher[at], student_logits[:, :shared], temperature)

    return row_losses(student_rows, student_head, of_chunk, rows_per_chunk(len(student_head.weight), chunk_mib), weights)
