"""Cached teacher distributions of a batch, top-k or sampled, and their divergence from the student's, in chunks of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from components.align_ti.head import CHUNK_MIB, Head, row_losses, rows_per_chunk


@dataclass(frozen=True)
class Rows(ABC):
    """Cached teacher distributions at N rows, by `TopK` or `Sampled`. Every field has N rows."""

    tokens: Tensor  # (N, k) long

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return replace(self, **{name: tensor[rows] for name, tensor in vars(self).items()})

    @abstractmethod
    def divergence(self, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """(N,) divergence per row, in nats. `student_logits` (N, V): cut to the shared vocabulary, float32 or wider."""


@dataclass(frozen=True)
class Cached:
    """Cached teacher rows of a batch. `index` (B, T) maps a position to its row in `rows`; -1: not cached."""

    rows: Rows
    index: Tensor

    def at(self, mask: Tensor) -> Rows:
        """Rows at a (B, T) bool mask, ordered by (sample, position). Raises ValueError if one of them is not cached."""
        index = self.index[mask]
        if bool((index < 0).any()):
            raise ValueError("the cache has no teacher distribution for some of the rows")
        return self.rows[index]


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
    """(N,) `Rows.divergence` of hidden rows (N, d_S), in chunks of rows; with `weights` (N,), their weighted sum ().

    The student's head is cut to `shared` columns."""

    def chunk_divergence(chunk: slice, student_logits: Tensor) -> Tensor:
        return teacher[chunk].divergence(student_logits[:, :shared], temperature)

    return row_losses(
        student_rows, student_head, chunk_divergence, rows_per_chunk(len(student_head.weight), chunk_mib), weights
    )
