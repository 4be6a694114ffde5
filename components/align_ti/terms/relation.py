"""L_relation: 1 - cos between both models' Gram matrices (Nv, Nv) of an image's visual logits. Units: images.

Logits are never materialised: logits logits^T = H (W^T W) H^T, H the visual rows' hidden states and W the head. Source:
LLaVA-KD, arXiv 2410.16236.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from components.align_ti.batch import of_images
from components.align_ti.seen import Seen
from components.align_ti.terms import Needs, images


@dataclass(frozen=True)
class Term:
    centred: bool = False  # logits minus their mean over the vocabulary, to which softmax is invariant
    needs = Needs(response=False, live=True, linear=True)
    units = staticmethod(images)

    def loss(self, seen: Seen) -> Tensor:
        if not bool(seen.batch.visual.any()):
            return seen.zero
        assert isinstance(seen.teacher, Tensor) and seen.teacher_head is not None  # guaranteed by `needs`
        mine = _relations(of_images(seen.student, seen.batch), seen.student_head.gram(seen.shared, self.centred))
        with torch.no_grad():
            if "gram" not in seen.of_teacher:
                seen.of_teacher["gram"] = seen.teacher_head.gram(seen.shared, self.centred)
            theirs = _relations(of_images(seen.teacher, seen.batch), seen.of_teacher["gram"])
        pairs = zip(mine, theirs, strict=True)
        return torch.stack([1 - F.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in pairs]).sum()


def _relations(states: list[Tensor], gram: Tensor) -> list[Tensor]:
    """Gram matrix (Nv, Nv) of the logits of each image."""
    with torch.autocast(gram.device.type, enabled=False):
        rows = [F.pad(h.to(gram.dtype), (0, len(gram) - h.shape[1]), value=1.0) for h in states]
        return [h @ gram @ h.T for h in rows]
