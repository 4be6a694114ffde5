"""L_received: 1 - cos between both models' attention received by visual tokens, summed over layers. Units: samples with
an image.

`rows: visual`, middle layers, without sinks: CompoDistill, arXiv 2510.12184. `rows: instruction`, first layer: Align-KD,
arXiv 2412.01282.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor

from components.align_ti.batch import Batch, permutation
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs
from components.align_ti.watch import Map, Watch

Pair = tuple[int, Annotated[tuple[int, ...], MinLen(1)]]  # a student layer, and the teacher layers whose mean is its target


@dataclass(frozen=True)
class Term:
    rows: Literal["visual", "instruction"] = "visual"
    layers: Literal["middle", "random"] | Annotated[tuple[Pair, ...], MinLen(1)] = "middle"  # by both depths, or pairs
    permuted: bool = False  # control: the teacher's visual tokens in another order
    sinks: bool = False  # False: entries above mean + std of the sample's map, in either model, are excluded

    @property
    def needs(self) -> Needs:
        pairs = self._pairs
        student_layers, teacher_layers = [layer for layer, _ in pairs], [layer for _, targets in pairs for layer in targets]
        return Needs(response=False, in_student=Watch(self._maps(student_layers)), in_teacher=Watch(self._maps(teacher_layers)))

    @property
    def _pairs(self) -> tuple[Pair, ...]:
        return ((-1, (-1,)),) if isinstance(self.layers, str) else self.layers  # what a rule needs, before depths are known

    def at_depth(self, student_layers: int, teacher_layers: int) -> Term:
        rules = {"middle": middle_layers, "random": random_layers}
        return (
            replace(self, layers=rules[self.layers](student_layers, teacher_layers)) if isinstance(self.layers, str) else self
        )

    def _maps(self, layers: list[int]) -> tuple[Map, ...]:
        return tuple(Map(layer, self.rows, each_row=True) for layer in dict.fromkeys(layers))

    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        return self._has_map(batch).sum().float()

    def _has_map(self, batch: Batch) -> Tensor:
        """(B,) bool: samples with an image and rows that attend to it."""
        rows: Tensor = getattr(batch, self.rows)
        return batch.visual.any(1) & rows.any(1)

    def loss(self, outputs: StepOutputs) -> Tensor:
        batch, losses = outputs.batch, [outputs.zero]
        for sample in self._has_map(batch).nonzero()[:, 0].tolist():
            R, Nv = int(getattr(batch, self.rows)[sample].sum()), int(batch.visual[sample].sum())
            for layer, teacher_layers in self._pairs:
                student_map = outputs.in_student.maps[Map(layer, self.rows, True)][sample, :R, :Nv]
                teacher_maps = [
                    outputs.in_teacher.maps[Map(teacher_layer, self.rows, True)][sample, :R, :Nv]
                    for teacher_layer in teacher_layers
                ]
                teacher_map = torch.stack(teacher_maps).mean(0)
                if self.permuted:
                    teacher_map = teacher_map[:, permutation(Nv, batch.ids[sample])]
                losses.append(1 - F.cosine_similarity(*self._received(student_map, teacher_map), dim=0))
        return torch.stack(losses).sum()

    def _received(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(Nv,) each: column means of two (R, Nv) maps over the unmasked entries."""
        mask = torch.ones_like(student)
        if not self.sinks:
            mask = (
                (student <= student.mean() + student.std()) & (teacher <= teacher.mean() + teacher.std()) & (teacher > 0)
            ).to(student.dtype)
        rows = mask.sum(0).clamp_min(1)
        return (student * mask).sum(0) / rows, (teacher * mask).sum(0) / rows


def middle_layers(student_layers: int, teacher_layers: int) -> tuple[Pair, ...]:
    """Up to seven student layers from a third of its depth on, each with consecutive teacher layers from a third of its own.

    The windows of the teacher overlap and end near three layers above its middle: 2 layers each of 24, 3 of 28 or 32, 5 of 40,
    as published.
    """
    student_start, teacher_start = round(student_layers / 3), round(teacher_layers / 3)
    count = max(1, min(7, student_layers - 2 * student_start, teacher_layers - teacher_start))
    width = max(1, min(teacher_layers // 2 - teacher_start - 2, teacher_layers - teacher_start - count + 1))
    return tuple((student_start + j, tuple(range(teacher_start + j, teacher_start + j + width))) for j in range(count))


def random_layers(student_layers: int, teacher_layers: int) -> tuple[Pair, ...]:
    """Control: as many pairs as `middle_layers` has, of other layers where there are as many, the same in every training."""
    middle, generator = middle_layers(student_layers, teacher_layers), random.Random("received")

    def draw(depth: int, excluded: set[int], count: int) -> list[int]:
        others = [layer for layer in range(depth) if layer not in excluded]
        return sorted(generator.sample(others if len(others) >= count else range(depth), count))

    students = draw(student_layers, {layer for layer, _ in middle}, len(middle))
    return tuple(
        (layer, tuple(draw(teacher_layers, {*window}, len(window))))
        for layer, (_, window) in zip(students, middle, strict=True)
    )
