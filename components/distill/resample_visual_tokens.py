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


def bilinear(source: int, target: int) -> Tensor:
    """(target^2, source^2) bilinear interpolation matrix, row sums 1, between square grids of sides `source` and `target`."""
    basis = torch.eye(source**2).view(source**2, 1, source, source)
    return F.interpolate(basis, size=(target, target), mode="bilinear", align_corners=False).flatten(1).T.contiguous()


@dataclass(frozen=True)
class _ResampledCache:
    cache: Any  # teacher's key/value cache
    batch: Batch  # teacher's batch
    index: Tensor  # (B, T) position of each student text token among the teacher's T'


class ResampledTeacher:
    """`FrozenTeacher` on its own batch (`Batch.teacher`), with outputs resampled to the student's grid."""

    def __init__(self, teacher: FrozenTeacher, teacher_side: int, student_side: int) -> None:
        """Side lengths of the teacher's and the student's grid."""
        self.teacher = teacher
        self.weights = bilinear(teacher_side, student_side)

    def features(self, batch: Batch, student_features: Any) -> Any:
        return self.teacher.features(_teacher_batch(batch), None)

    def plain(
        self, batch: Batch, features: Any, keep: bool, with_attention: bool
    ) -> tuple[Tensor, _ResampledCache | None, Tensor | None]:
        """`FrozenTeacher.plain`, resampled to the student's T positions and Nv visual tokens."""
        teacher_batch = _teacher_batch(batch)
        teacher_hidden, cache, attention = self.teacher.plain(teacher_batch, features, keep, with_attention)
        hidden = self._to_student_positions(teacher_hidden, batch)
        attention = None if attention is None else self._to_student_grid(attention)
        if not keep:
            return hidden, None, attention
        index = torch.zeros_like(batch.input_ids)
        index[_text(batch)] = _text(teacher_batch).nonzero()[:, 1]
        return hidden, _ResampledCache(cache, teacher_batch, index), attention

    @contextmanager
    def watched(self, batch: Batch, watch: Watch) -> Iterator[Watched]:
        """`FrozenTeacher.watched` on the student's grid. Raises ModelError for maps per row or of visual rows."""
        if any(map.each_row or map.rows == "visual" for map in watch.maps):
            raise ModelError(
                "a loss term reads attention row by row or of visual rows; teacher and student see an image on different grids,"
                " between which only the mean over text rows is interpolated"
            )
        with self.teacher.watched(_teacher_batch(batch), watch) as captured:
            yield captured
        captured.maps = {map: self._to_student_grid(tensor) for map, tensor in captured.maps.items()}
        captured.hidden = {layer: self._to_student_positions(states, batch) for layer, states in captured.hidden.items()}

    def _to_student_grid(self, attention: Tensor) -> Tensor:
        """(B, Nv) interpolation of the teacher's (B, Nv') per image; width 0 without images."""
        if not attention.shape[1]:
            return attention
        return (attention.unflatten(1, (-1, self.weights.shape[1])) @ self.weights.T.to(attention)).flatten(1)

    def _to_student_positions(self, states: Tensor, batch: Batch) -> Tensor:
        """(B, T, d) hidden states at the student's positions, from the teacher's (B, T', d)."""
        teacher_batch = _teacher_batch(batch)
        hidden = states.new_zeros(*batch.input_ids.shape, states.shape[-1])
        hidden[_text(batch)] = states[_text(teacher_batch)]
        weights = self.weights.to(states)
        hidden[batch.visual] = (weights @ states[teacher_batch.visual].unflatten(0, (-1, weights.shape[1]))).flatten(0, 1)
        return hidden

    def continued(self, cache: _ResampledCache, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """`FrozenTeacher.continued` for the student's positions and attention mask (B, 1, E, T + E)."""
        T = cache.index.shape[1]
        teacher_positions = cache.index.gather(1, positions)
        valid = cache.batch.attention_mask.bool()
        column = torch.arange(valid.shape[1], device=valid.device)
        prefix = (column < teacher_positions[..., None]) & valid[:, None, :] & mask[:, 0, :, :T].any(-1, keepdim=True)
        return self.teacher.continued(
            cache.cache, tokens, teacher_positions, torch.cat([prefix[:, None], mask[..., T:]], dim=-1)
        )

    @property
    def equal_weights(self) -> Tensor:
        return self.teacher.equal_weights

    @property
    def vlm(self) -> VLM:
        return self.teacher.vlm

    @property
    def head(self) -> Head:
        return self.teacher.head


def _teacher_batch(batch: Batch) -> Batch:
    assert batch.teacher is not None, "the collator was not told of the teacher's processor"
    return batch.teacher


def _text(batch: Batch) -> Tensor:
    """(B, T) bool: text tokens, common to teacher and student."""
    return batch.attention_mask.bool() & ~batch.visual
