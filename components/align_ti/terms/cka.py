"""L_cka: 1 - centred kernel alignment between both models' L2-normalised visual hidden states. Units: images.

Hidden widths may differ. Source: the relational part of GRACE, arXiv 2601.22709.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from components.align_ti.batch import permuted_by_image, split_by_image
from components.align_ti.head import at_least_float32
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, images
from components.align_ti.watch import Watch


@dataclass(frozen=True)
class Term:
    layer: int = -2  # student layer; -2: the last but one
    teacher_layer: int = -2
    permuted: bool = False  # control: the teacher's visual tokens in another order
    units = staticmethod(images)

    @property
    def needs(self) -> Needs:
        return Needs(response=False, in_student=Watch(hidden=(self.layer,)), in_teacher=Watch(hidden=(self.teacher_layer,)))

    def loss(self, outputs: StepOutputs) -> Tensor:
        student = split_by_image(outputs.in_student.hidden[self.layer], outputs.batch)
        teacher = split_by_image(outputs.in_teacher.hidden[self.teacher_layer], outputs.batch)
        if self.permuted:
            teacher = permuted_by_image(teacher, outputs.batch)
        pairs = [(_kernel(a).flatten(), _kernel(b).flatten()) for a, b in zip(student, teacher, strict=True)]
        return torch.stack([1 - F.cosine_similarity(a, b, dim=0) for a, b in pairs]).sum() if pairs else outputs.zero


def _kernel(states: Tensor) -> Tensor:
    """(Nv, Nv) Gram matrix of (Nv, d) states, L2-normalised, then centred."""
    with torch.autocast(states.device.type, enabled=False):
        rows = F.normalize(states.to(at_least_float32(states.dtype)), dim=-1)
        rows = rows - rows.mean(0)
        return rows @ rows.T
