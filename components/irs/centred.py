"""Centred attention: a layer's attention less its background.

Most of the attention that an instruction pays to an image goes to the same tokens whatever is asked: that is its background,
attention sinks among it. `centred` takes it away and keeps what is above it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from components.align_ti.batch import by_column
from components.errors import DataError

NOTHING = 1e-6  # share of a sum of 1 below which float32 shows no difference


def shares(attention: Tensor) -> Tensor:
    """(..., Nv) attention as shares of what goes to the image, sum 1; zeros where none does."""
    return attention / attention.sum(-1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)


def centred(attention: Tensor, background: Tensor) -> Tensor:
    """(..., Nv) shares above those of the background (of sum 1, broadcast), their sum made 1 again.

    Zeros where nothing is above it, or no attention went to the image: `visual_weights` then weighs the image's tokens equally.
    Shares and not raw attention are compared, so that an instruction that pays the image less attention keeps its place in it.
    """
    above = (shares(attention) - background).clamp_min(0)
    total = above.sum(-1, keepdim=True)
    return torch.where(total > NOTHING, above / total.clamp_min(NOTHING), 0.0)


def centred_in_batch(attention: Tensor, background: Tensor, pictures: Tensor, ids: Sequence[str]) -> Tensor:
    """`centred`, image by image, for a batch's attention (B, Nv); `pictures` (B, T) as in the batch.

    Raises DataError, naming the first sample, if an image has another number of visual tokens than the background.
    """
    for number in range(1, int(pictures.max()) + 1):
        tokens = (pictures == number).sum(1)
        if bool((other := (tokens > 0) & (tokens != len(background))).any()):
            row = int(other.int().argmax())
            raise DataError(
                f"sample {ids[row]}: its image has {int(tokens[row])} visual tokens, and the background that `centred` takes"
                f" away was measured on images of {len(background)}; set weighting: mean in params/irs.yaml"
            )
    if not attention.shape[1]:
        return attention
    return centred(attention.unflatten(1, (-1, len(background))), background.to(attention)).flatten(1)


def without_weights(weights: Tensor, pictures: Tensor) -> Tensor:
    """How many images' tokens weigh the same, because no attention is left to weigh them by; their weights (B, Nv) are 0."""
    columns = by_column(pictures)
    totals = weights.new_zeros(len(weights), int(pictures.max()) + 1).scatter_add_(1, columns, weights)
    shown = torch.zeros_like(totals, dtype=torch.bool).scatter_(1, columns, True)
    return ((totals == 0) & shown)[:, 1:].sum()
