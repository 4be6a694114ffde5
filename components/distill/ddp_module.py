"""Module wrapped by DDP, FSDP2 and DeepSpeed: all student passes go through its forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.align_ti.batch import Batch
from components.align_ti.step import AlignTI
from components.models.families import parts


class Replica(nn.Module):
    """`AlignTI` on one rank of several.

    FSDP2 gathers the student's weights only inside this forward, so the sampling pass goes through it as well; the output is a
    tuple, in which FSDP2 finds tensors.

    Args:
        seeded: seed dropout per pass with the first sample's key, so that a resumed training drops the same units.
    """

    def __init__(self, method: AlignTI, ranks: int, seeded: bool = False) -> None:
        super().__init__()
        self.method = method
        self._ranks = ranks
        self._seeded = seeded

    def forward(
        self, batch: Batch, keys: list[int], draws: Tensor | None = None, only_draw: bool = False
    ) -> tuple[Tensor, ...]:
        """Sums and counts of the terms, and (1,) number of response steps left out; with `only_draw`, (N, d) alternatives."""
        if self._seeded:
            torch.manual_seed(keys[0])
        if only_draw:
            return (self.method.draw(batch, keys),)
        terms = self.method(batch, keys, draws)
        sums = terms.sums
        if self._ranks > 1 or not sums.requires_grad:  # no gradient: frozen language model, and no image in the batch
            sums = sums + self._touch_unused()
        return sums, terms.counts, terms.counts.new_tensor([terms.steps_left_out])

    def _touch_unused(self) -> Tensor:
        """Zero whose gradient touches parameters that a batch may leave unused: vision tower and projector without an image,
        modules of terms and, without text rows, the head.

        Ranks all-reduce gradients per parameter: a missing one would stall the others or be matched with another's.
        """
        model = self.method.student.model
        head = model.get_output_embeddings().parameters()
        model_parts = parts(model)
        optional = (*model_parts["vision_tower"], *model_parts["projector"], *head, *self.method.term_modules.parameters())
        zeros = [p.flatten()[0] * 0.0 for p in optional if p.requires_grad]
        return torch.stack(zeros).sum() if zeros else torch.zeros(())
