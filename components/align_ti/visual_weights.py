"""Weights of an image's visual rows in L_iva."""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from torch import Tensor


def visual_weights(attention: Tensor, visual: Tensor) -> Tensor:
    """The w_i of L_iva = sum_i w_i D(p_T(.|v_<=i), p_S(.|v_<=i)) over the visual rows of all images. Units: images.

    They are the attention (B, Nv), zero at columns beyond a sample's own, normalised to sum 1 over each image. An image that
    no instruction token follows has no attention to speak of: its tokens weigh the same.

    Args:
        visual: (B, T) bool, as in the batch. Nv is the most visual tokens of a sample.

    Returns:
        (N,) the weights of the batch's visual rows, in order of (sample, position).
    """
    owned = torch.arange(attention.shape[1], device=visual.device) < visual.sum(1, keepdim=True)
    attention = torch.where(attention.sum(1, keepdim=True) > 0, attention, owned.to(attention.dtype))
    return (attention / attention.sum(1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny))[owned]


Change = Literal["permuted", "sinks_removed", "sinks_alone"]


def changed(attention: Tensor, visual: Tensor, ids: list[str], change: Change) -> Tensor:
    """(B, Nv) attention of which each image's own tokens are permuted, always alike for one of `ids`, or without its sinks, or
    of sinks alone. A sink takes more than its image's mean + 3 standard deviations."""
    found = torch.zeros_like(attention)
    for sample, (row, size) in enumerate(zip(attention, visual.sum(1).tolist(), strict=True)):
        own = row[:size]
        if change == "permuted":
            stream = torch.Generator().manual_seed(zlib.crc32(ids[sample].encode()))
            found[sample, :size] = own[torch.randperm(size, generator=stream).to(own.device)]
        elif size:
            sinks = own > own.mean() + 3 * own.std(correction=0)
            found[sample, :size] = own * (sinks if change == "sinks_alone" else ~sinks)
    return found


def concentration(weights: Tensor, visual: Tensor) -> dict[str, Tensor]:
    """Of (N,) `visual_weights`, summed over images: effective sample size 1 / sum w^2, and the share of the five highest."""
    of_image = weights.new_zeros(visual.shape)
    of_image[visual] = weights
    of_image = of_image[visual.any(1)]
    top = of_image.topk(min(5, visual.shape[1])).values.sum()
    effective = (1 / of_image.square().sum(1)).sum()
    return {"images": weights.new_tensor(len(of_image)), "effective_tokens": effective, "top5": top}


def uniform_attention(visual: Tensor) -> Tensor:
    """(B, Nv) equal attention: the control of the weighting."""
    owned = torch.arange(int(visual.sum(1).max()), device=visual.device) < visual.sum(1, keepdim=True)
    return owned.float()
