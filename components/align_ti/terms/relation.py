"""L_relation: 1 - cos between both models' Gram matrices (Nv, Nv) of an image's visual logits. Units: images.

Logits are never materialised: logits logits^T = H (W^T W) H^T, H the visual rows' hidden states and W the head. Source:
LLaVA-KD, arXiv 2410.16236.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from components.align_ti.batch import permuted_by_image, split_by_image
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, images


@dataclass(frozen=True)
class Term:
    centred: bool = False  # logits minus their mean over the vocabulary, to which softmax is invariant
    permuted: bool = False  # control: the teacher's visual tokens in another order
    needs = Needs(response=False, live=True, linear=True)
    units = staticmethod(images)

    def loss(self, outputs: StepOutputs) -> Tensor:
        if not bool(outputs.batch.visual.any()):
            return outputs.zero
        assert isinstance(outputs.teacher, Tensor) and outputs.teacher_head is not None  # guaranteed by `needs`
        student = _relations(
            split_by_image(outputs.student, outputs.batch), outputs.student_head.gram(outputs.shared, self.centred)
        )
        with torch.no_grad():
            if "gram" not in outputs.teacher_constants:
                outputs.teacher_constants["gram"] = outputs.teacher_head.gram(outputs.shared, self.centred)
            teacher_states = split_by_image(outputs.teacher, outputs.batch)
            if self.permuted:
                teacher_states = permuted_by_image(teacher_states, outputs.batch)
            teacher = _relations(teacher_states, outputs.teacher_constants["gram"])
        pairs = zip(student, teacher, strict=True)
        return torch.stack([1 - F.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in pairs]).sum()


def _relations(states: list[Tensor], gram: Tensor) -> list[Tensor]:
    """Gram matrix (Nv, Nv) of the logits of each image."""
    with torch.autocast(gram.device.type, enabled=False):
        rows = [F.pad(h.to(gram.dtype), (0, len(gram) - h.shape[1]), value=1.0) for h in states]
        return [h @ gram @ h.T for h in rows]
