"""Image dependence of a response token: drop of the teacher's log-probability under an edit of the image (L_va_kd).

Blurred: each side downsampled by 10 and upsampled again, as in VA-OPD, arXiv 2605.21924.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from components.align_ti.batch import Batch
from components.align_ti.head import CHUNK_MIB, Head, row_losses, rows_per_chunk

JUST_ABOVE = 1e-6


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
    """Copy of the batch whose pixels have the mean colour of the processor's normalisation, in the teacher's batch too.

    Tiles (images, tiles, 3, H, W) of zeros are padding to Idefics3 and SmolVLM, which drop them, so those of an image are just
    above."""
    pixels = batch.pixel_values
    if pixels is not None:
        pixels = (pixels != 0).to(pixels) * JUST_ABOVE if pixels.dim() == 5 else torch.zeros_like(pixels)
    return replace(batch, pixel_values=pixels, teacher=None if batch.teacher is None else blank(batch.teacher))


EDITS = {"blurred": blurred, "blank": blank}


@torch.no_grad()
def image_dependence(
    head: Head, hidden: Tensor, edited_hidden: Tensor, gold: Tensor, columns: int | None, chunk_mib: float = CHUNK_MIB
) -> Tensor:
    """(N,) image dependence max(0, log p_T(y | image) - log p_T(y | edited image)) of tokens (N,), from hidden rows (N, d)."""

    def token_losses(chunk: slice, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :columns], gold[chunk], reduction="none")

    size = rows_per_chunk(len(head.weight), chunk_mib)
    image_loss, edited_loss = (row_losses(rows, head, token_losses, size) for rows in (hidden, edited_hidden))
    return (edited_loss - image_loss).clamp_min(0)
