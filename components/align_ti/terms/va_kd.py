"""L_va_kd: L_kd in which the most image-dependent response tokens carry half of the weight. Units: response tokens.

Image dependence of a token: drop of the teacher's log-probability under a blurred image, each side downsampled by 10 and
upsampled again. Source: VA-OPD, arXiv 2605.21924, here on the data's answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from components.align_ti.batch import Batch
from components.align_ti.divergence import Divergence
from components.align_ti.head import row_losses, rows_per_chunk
from components.align_ti.row_weights import in_top, over_mean, random_priority, row_weights
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import Needs, Share, View, responses


def blurred(batch: Batch) -> Batch:
    """Copy of the batch with blurred pixels (..., 3, H, W): images, or each of their tiles, down- and upsampled. Flat patches
    (N, 3 x pixels) become their mean colour."""
    pixels = batch.pixel_values
    if pixels is not None and pixels.dim() == 2:
        colours = pixels.unflatten(1, (3, -1))
        pixels = colours.mean(-1, keepdim=True).expand_as(colours).flatten(1)
    elif pixels is not None:
        (H, W), tiles = pixels.shape[-2:], pixels.flatten(0, -4)
        small = F.interpolate(tiles, (max(1, H // 10), max(1, W // 10)), mode="bilinear", antialias=True)
        pixels = F.interpolate(small, (H, W), mode="nearest").view_as(pixels)
    return replace(batch, pixel_values=pixels, teacher=None if batch.teacher is None else blurred(batch.teacher))


def blank(batch: Batch) -> Batch:
    """Copy of the batch whose pixels have the mean colour of the processor's normalisation, in the teacher's batch too."""
    pixels = None if batch.pixel_values is None else torch.zeros_like(batch.pixel_values)
    return replace(batch, pixel_values=pixels, teacher=None if batch.teacher is None else blank(batch.teacher))


EDITS = {"blurred": blurred, "blank": blank}


@dataclass(frozen=True)
class Term:
    share: Share = 0.2  # share of each sample's response tokens that carry half of the weight
    by: Literal["blurred", "blank", "entropy", "random"] = "blurred"  # which edit of the image; or controls without one
    divergence: Divergence | None = None  # None: the arm's
    units = staticmethod(responses)

    @property
    def needs(self) -> Needs:
        views = (View(self.by, EDITS[self.by], student=False),) if self.by in EDITS else ()
        return Needs(live=True, views=views)

    def loss(self, outputs: StepOutputs) -> Tensor:
        top = in_top(self._priority(outputs), outputs.sample, self.share)
        halves = over_mean(top.double(), outputs.sample) + over_mean((~top).double(), outputs.sample)
        weights = over_mean(halves, outputs.sample)  # 1 for a sample of one response token
        weights = torch.where(outputs.batch.visual.any(1)[outputs.sample], weights, 1.0).to(outputs.zero.dtype)
        return outputs.divergence(outputs.response_rows, weights, self.divergence)

    def _priority(self, outputs: StepOutputs) -> Tensor:
        """(N,) by which response tokens are chosen."""
        if self.by == "entropy":
            return row_weights(outputs, "entropy")
        return random_priority(outputs) if self.by == "random" else self._image_dependence(outputs)

    @torch.no_grad()
    def _image_dependence(self, outputs: StepOutputs) -> Tensor:
        """(N,) image dependence max(0, log p_T(y | image) - log p_T(y | edited image))."""
        head, (_, edited_hidden) = outputs.teacher_head, outputs.views[self.by]
        assert isinstance(outputs.teacher, Tensor) and edited_hidden is not None and head is not None  # guaranteed by `needs`

        def token_losses(chunk: slice, logits: Tensor) -> Tensor:
            return F.cross_entropy(logits[:, : outputs.shared], outputs.gold[chunk], reduction="none")

        size = rows_per_chunk(len(head.weight), outputs.chunk_mib)
        image_loss, edited_loss = (
            row_losses(states[outputs.response_rows], head, token_losses, size) for states in (outputs.teacher, edited_hidden)
        )
        return (edited_loss - image_loss).clamp_min(0)
