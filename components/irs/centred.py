"""Centred attention: a layer's attention minus its background, clamped at 0.

Most attention from an instruction to an image goes to the same tokens whatever the question: this is the background,
attention sinks included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from components.align_ti.batch import by_column
from components.errors import DataError

TOLERANCE = 1e-6  # residual of a sum of 1 that float32 cannot resolve


def shares(attention: Tensor) -> Tensor:
    """(..., Nv) attention normalised to sum 1 over the visual tokens; zeros if there is none."""
    return attention / attention.sum(-1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)


def centred(attention: Tensor, background: Tensor) -> Tensor:
    """(..., Nv) shares above the background (sum 1, broadcast), renormalised to sum 1.

    Zeros if nothing exceeds the background or the image got no attention: `visual_weights` then falls back to uniform weights.
    Shares rather than raw attention, so that the total attention to the image has no influence.
    """
    excess = (shares(attention) - background).clamp_min(0)
    total = excess.sum(-1, keepdim=True)
    return torch.where(total > TOLERANCE, excess / total.clamp_min(TOLERANCE), 0.0)


def centred_in_batch(attention: Tensor, background: Tensor, pictures: Tensor, ids: Sequence[str]) -> Tensor:
    """`centred` per image for a batch's attention (B, Nv); `pictures` (B, T) as in the batch.

    Raises DataError, naming the first sample, if an image and the background differ in their number of visual tokens.
    """
    for number in range(1, int(pictures.max()) + 1):
        tokens = (pictures == number).sum(1)
        if bool((mismatched := (tokens > 0) & (tokens != len(background))).any()):
            row = int(mismatched.int().argmax())
            raise DataError(
                f"sample {ids[row]}: its image has {int(tokens[row])} visual tokens, and the background that `centred` takes"
                f" away was measured on images of {len(background)}; set weighting: mean in params/irs.yaml"
            )
    if not attention.shape[1]:
        return attention
    return centred(attention.unflatten(1, (-1, len(background))), background.to(attention)).flatten(1)


def count_unweighted_images(weights: Tensor, pictures: Tensor) -> Tensor:
    """() number of images whose weights (B, Nv) are all 0, which then get uniform weights."""
    columns = by_column(pictures)
    totals = weights.new_zeros(len(weights), int(pictures.max()) + 1).scatter_add_(1, columns, weights)
    present = torch.zeros_like(totals, dtype=torch.bool).scatter_(1, columns, True)
    return ((totals == 0) & present)[:, 1:].sum()
