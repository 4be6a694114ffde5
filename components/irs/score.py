"""Scores of a layer's visual weights: IRS, their change with the instruction, and pointing, their share on the question's
region."""

from __future__ import annotations

import torch
from torch import Tensor


def irs_scores(attention: Tensor) -> Tensor:
    """IRS(l) = 1 - E[cos(a_l(x1), a_l(x2))] over pairs of different instructions on one image (docs/method.md, "IRS").

    Args:
        attention: (L, X, I, Nv), non-negative: layer l's attention from instruction i's rows to the visual columns of image
            x, averaged over heads and rows. I >= 2.

    Returns:
        (L, X), each image's mean over its I (I - 1) / 2 pairs; images are the independent units.

    Raises:
        ValueError: no pair, or an attention map of all zeros.
    """
    _, X, I, _ = attention.shape  # noqa: E741
    if I < 2 or X < 1:
        raise ValueError(f"IRS compares instructions on one image: got {X} image(s) with {I} instruction(s)")
    norm = attention.norm(dim=-1, keepdim=True)
    if bool((norm == 0).any()):
        raise ValueError("an image got no attention at all: are the visual columns those of the image tokens?")
    unit = attention / norm
    cosine = unit @ unit.transpose(-1, -2)  # (L, X, I, I)
    first, second = torch.triu_indices(I, I, offset=1)
    return 1 - cosine[..., first, second].mean(-1)


def pointing(weights: Tensor, region: Tensor) -> Tensor:
    """Energy-based pointing game (Wang et al., Score-CAM, 2020): share of the weights on the question's region.

    Args:
        weights: (L, X, I, Nv), sum 1 over the visual tokens.
        region: (X, I, Nv), share of each token's patch in the region; all zero if unknown.

    Returns:
        (L, X'), mean over each image's instructions with a region; X' is the number of images with at least one.
    """
    has_region = region.sum(-1) > 0  # (X, I)
    on_region = (weights * region).sum(-1)  # (L, X, I)
    per_image = (on_region * has_region).sum(-1) / has_region.sum(-1).clamp_min(1)
    return per_image[:, has_region.any(-1)]
