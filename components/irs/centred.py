"""Centred attention: a layer's attention less its background.

Most of the attention that an instruction pays to an image goes to the same tokens whatever is asked: that is its background,
attention sinks among it. `centred` takes it away and keeps what is above it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def centred_in_batch(attention: Tensor, background: Tensor, visual: Tensor, ids: Sequence[str]) -> Tensor:
    """`centred` for a batch's attention (B, Nv); `visual` (B, T) bool.

    Raises DataError, naming the first sample, if an image has another number of visual tokens than the background.
    """
    tokens = visual.sum(1)
    if bool((other := (tokens > 0) & (tokens != len(background))).any()):
        row = int(other.int().argmax())
        raise DataError(
            f"sample {ids[row]}: its image has {int(tokens[row])} visual tokens, and the background that `centred` takes away"
            f" was measured on images of {len(background)}; set weighting: mean in params/irs.yaml"
        )
    return centred(attention, background.to(attention)) if attention.shape[1] else attention


def without_weights(weights: Tensor, visual: Tensor) -> Tensor:
    """How many images' tokens weigh the same, because no attention is left to weigh them by."""
    return ((weights.sum(1) == 0) & visual.any(1)).sum()
