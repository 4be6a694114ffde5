"""Resampling between visual grids, for a teacher whose grid differs from the student's.

Each model reads the sample from its own processor. Text rows are the same tokens in both and are copied. At visual tokens the
teacher's hidden states and attention are interpolated bilinearly from its square grid to the student's. With a linear head
this interpolates logits: a distribution is the geometric mean of its neighbours, renormalised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from components.align_ti.batch import Batch
from components.align_ti.head import Head
from components.align_ti.watch import Watch, Watched
from components.distill.teacher import FrozenTeacher
from components.errors import ModelError
from components.models.vlm import VLM


def bilinear(theirs: int, mine: int) -> Tensor:
    """(mine^2, theirs^2) bilinear interpolation matrix, row sums 1, from a square grid of side `theirs` to side `mine`."""
    basis = torch.eye(theirs**2).view(theirs**2, 1, theirs, theirs)
    return F.interpolate(basis, size=(mine, mine), mode="bilinear", align_corners=False).flatten(1).T.contiguous()


@dataclass(frozen=True)
class _Kept:
    own: Any  # teacher's key/value cache
    batch: Batch  # teacher's batch
    index: Tensor  # (B, T) position of each student text token among the teacher's T'


class ResampledTeacher:
    """`FrozenTeacher` on its own batch (`Batch.teacher`), with outputs resampled to the student's grid."""

    def __init__(self, teacher: FrozenTeacher, theirs: int, mine: int) -> None:
        """`theirs`, `mine`: side lengths of the teacher's and the student's grid."""
        self.teacher = teacher
        self.weights = bilinear(theirs, mine)

    def features(self, batch: Batch, student_features: Any) -> Any:
        return self.teacher.features(_own(batch), None)

    def plain(
        self, batch: Batch, features: Any, keep: bool, with_attention: bool
    ) -> tuple[Tensor, _Kept | None, Tensor | None]:
        """`FrozenTeacher.plain`, resampled to the student's T positions and Nv visual tokens."""
        own = _own(batch)
        theirs, cache, attention = self.teacher.plain(own, features, keep, with_attention)
        hidden = self._of_student(theirs, batch)
        attention = None if attention is None else self._on_grid(attention)
        if not keep:
            return hidden, None, attention
        index = torch.zeros_like(batch.input_ids)
        index[_text(batch)] = _text(own).nonzero()[:, 1]
        return hidden, _Kept(cache, own, index), attention

    @contextmanager
    def watched(self, batch: Batch, watch: Watch) -> Iterator[Watched]:
        """`FrozenTeacher.watched` on the student's grid. Raises ModelError for maps per row or of visual rows."""
        if any(map.each_row or map.rows == "visual" for map in watch.maps):
            raise ModelError(
                "a loss term reads attention row by row or of visual rows; teacher and student see an image on different grids,"
                " between which only the mean over text rows is interpolated"
            )
        with self.teacher.watched(_own(batch), watch) as seen:
            yield seen
        seen.maps = {map: self._on_grid(tensor) for map, tensor in seen.maps.items()}
        seen.hidden = {layer: self._of_student(states, batch) for layer, states in seen.hidden.items()}

    def _on_grid(self, attention: Tensor) -> Tensor:
        """(B, Nv) interpolation of the teacher's (B, Nv') per image; width 0 without images."""
        if not attention.shape[1]:
            return attention
        return (attention.unflatten(1, (-1, self.weights.shape[1])) @ self.weights.T.to(attention)).flatten(1)

    def _of_student(self, theirs: Tensor, batch: Batch) -> Tensor:
        """(B, T, d) hidden states at the student's positions, from the teacher's (B, T', d)."""
        own = _own(batch)
        hidden = theirs.new_zeros(*batch.input_ids.shape, theirs.shape[-1])
        hidden[_text(batch)] = theirs[_text(own)]
        weights = self.weights.to(theirs)
        hidden[batch.visual] = (weights @ theirs[own.visual].unflatten(0, (-1, weights.shape[1]))).flatten(0, 1)
        return hidden

    def continued(self, kept: _Kept, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """`FrozenTeacher.continued` for the student's positions and attention mask (B, 1, E, T + E)."""
        T = kept.index.shape[1]
        there = kept.index.gather(1, positions)
        real = kept.batch.attention_mask.bool()
        column = torch.arange(real.shape[1], device=real.device)
        prefix = (column < there[..., None]) & real[:, None, :] & mask[:, 0, :, :T].any(-1, keepdim=True)
        return self.teacher.continued(kept.own, tokens, there, torch.cat([prefix[:, None], mask[..., T:]], dim=-1))

    @property
    def equal_weights(self) -> Tensor:
        return self.teacher.equal_weights

    @property
    def vlm(self) -> VLM:
        return self.teacher.vlm

    @property
    def head(self) -> Head:
        return self.teacher.head


def _own(batch: Batch) -> Batch:
    own: Batch | None = batch.teacher  # type: ignore[attr-defined]  # as collated ones have
    assert own is not None, "the collator was not told of the teacher's processor"
    return own


def _text(batch: Batch) -> Tensor:
    """(B, T) bool: text tokens, common to teacher and student."""
    return batch.attention_mask.bool() & ~batch.visual
