"""Module that DDP, FSDP2 and DeepSpeed wrap: every student pass goes through its forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.align_ti.batch import Batch
from components.align_ti.step import AlignTI
from components.models.families import parts


class Replica(nn.Module):
    """`AlignTI` on one rank of several.

    FSDP2 has the student's weights together only inside this forward, so that the pass which draws goes through it as well;
    and it returns a tuple because that is what FSDP2 finds tensors in.

    Args:
        seeded: each pass's dropout is drawn from the first sample's key, so that a resumed training drops what it would have.
    """

    def __init__(self, method: AlignTI, ranks: int, seeded: bool = False) -> None:
        super().__init__()
        self.method = method
        self._ranks = ranks
        self._seeded = seeded

    def forward(
        self, batch: Batch, keys: list[int], draws: Tensor | None = None, only_draw: bool = False
    ) -> tuple[Tensor, ...]:
        """Sums and counts of the terms and (1,) response steps left out; or, `only_draw`, the (N, d) alternatives."""
        if self._seeded:
            torch.manual_seed(keys[0])
        if only_draw:
            return (self.method.draw(batch, keys),)
        terms = self.method(batch, keys, draws)
        sums = terms.sums + self._idle() if self._ranks > 1 else terms.sums
        return sums, terms.counts, terms.counts.new_tensor([terms.steps_left_out])

    def _idle(self) -> Tensor:
        """Zero, with a gradient of zeros for what a batch without an image does not use: tower, projector, modules of terms
        and, where no term has text rows, the head.

        Ranks exchange gradients parameter by parameter: one that has none would be waited for, or get another's.
        """
        model = self.method.student.model
        head = model.get_output_embeddings().parameters()
        of = parts(model)
        used = (*of["vision_tower"], *of["projector"], *head, *self.method.term_modules.parameters())
        zeros = [p.flatten()[0] * 0.0 for p in used if p.requires_grad]
        return torch.stack(zeros).sum() if zeros else torch.zeros(())
