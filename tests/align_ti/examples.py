"""Terms that read what the paper's do not: attention maps, hidden states through a module of their own, an edited batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.align_ti import step, terms
from components.align_ti.batch import Batch
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, View, images
from components.align_ti.watch import Map, Watch
from tests import tiny

MAPS = (Map(0), Map(1, "response"), Map(1, "visual", each_row=True), Map(1))


@dataclass(frozen=True)
class Attention:
    """1 - cos of the two models' attention over the image, mean over maps."""

    needs = Needs(response=False, in_student=Watch(MAPS), in_teacher=Watch(MAPS))

    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        return images(batch)

    def loss(self, outputs: StepOutputs) -> Tensor:
        has = outputs.batch.visual.any(1)
        pairs = [(outputs.in_student.maps[m][has].flatten(1), outputs.in_teacher.maps[m][has].flatten(1)) for m in MAPS]
        return outputs.zero + sum((1 - F.cosine_similarity(a, b, dim=1)).sum() for a, b in pairs) / len(MAPS)


@dataclass(frozen=True)
class Hidden:
    """Squared distance of the visual rows' hidden states after layer 0, by a projection of the term's own."""

    needs = Needs(response=False, in_student=Watch(hidden=(0,)), in_teacher=Watch(hidden=(1,)))

    def module(self, student_width: int, teacher_width: int | None) -> nn.Module:
        assert teacher_width is not None  # live, as `needs` asks
        return nn.Linear(student_width, teacher_width, bias=False)

    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        return images(batch)

    def loss(self, outputs: StepOutputs) -> Tensor:
        rows = outputs.batch.visual
        projected = outputs.modules["hidden"](outputs.in_student.hidden[0][rows])
        return (projected - outputs.in_teacher.hidden[1][rows]).square().mean(-1).sum() / tiny.NV


def blank(batch: Batch) -> Batch:
    return replace(batch, pixel_values=None if batch.pixel_values is None else torch.zeros_like(batch.pixel_values))


def moved(states: Tensor, blind: Tensor, batch: Batch) -> Tensor:
    """(images,) distance of two (B, T, d) states over each sample's real tokens."""
    real = batch.attention_mask.bool() & batch.visual.any(1, keepdim=True)  # the embedding of padding has no gradient
    return ((states - blind).square().sum(-1) * real).sum(1)[batch.visual.any(1)].sqrt()


@dataclass(frozen=True)
class Blind:
    """How far each model's states move when the image is blank, squared difference: rises with `outputs.progress`."""

    needs = Needs(response=False, views=(View("blank", blank),))

    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        return images(batch)

    def loss(self, outputs: StepOutputs) -> Tensor:
        student_blank, teacher_blank = outputs.views["blank"]
        assert student_blank is not None and teacher_blank is not None and isinstance(outputs.teacher, Tensor)
        return (
            outputs.progress
            * (moved(outputs.student, student_blank, outputs.batch) - moved(outputs.teacher, teacher_blank, outputs.batch))
            .square()
            .sum()
        )


EXAMPLES = {"attention": Attention, "hidden": Hidden, "blind": Blind}


def named(patch: pytest.MonkeyPatch) -> None:
    """While `patch` lasts, these terms are found by name."""
    real = terms.term_class
    for module in (step, terms):
        patch.setattr(module, "term_class", lambda name: EXAMPLES.get(name) or real(name))
