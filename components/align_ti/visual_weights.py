"""Weights of an image's visual rows in L_iva."""

from __future__ import annotations

import random
import zlib
from typing import Literal

import torch
from torch import Tensor

from components.align_ti.batch import by_column, owners


def visual_weights(attention: Tensor, pictures: Tensor) -> Tensor:
    """The w_i of L_iva = sum_i w_i D(p_T(.|v_<=i), p_S(.|v_<=i)) over the visual rows of all images. Units: images.

    They are the attention (B, Nv), zero at columns beyond a sample's own, normalised to sum 1 over each image. An image that
    no instruction token follows has no attention to speak of: its tokens weigh the same.

    Args:
        pictures: (B, T) long, as in the batch. Nv is the most visual tokens of a sample.

    Returns:
        (N,) the weights of the batch's visual rows, in order of (sample, position).
    """
    columns = by_column(pictures)
    weights = torch.zeros_like(attention)
    for number in range(1, int(columns.max()) + 1 if columns.numel() else 1):
        own = (columns == number).to(attention.dtype)
        seen = attention * own
        seen = torch.where(seen.sum(1, keepdim=True) > 0, seen, own)
        weights = weights + seen / seen.sum(1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)
    return weights[columns > 0]


Change = Literal["permuted", "sinks_removed", "sinks_alone"]


def changed(attention: Tensor, pictures: Tensor, ids: list[str], change: Change) -> Tensor:
    """(B, Nv) attention of which each image's own tokens are permuted, always alike for one of `ids`, or without its sinks, or
    of sinks alone. A sink takes more than its image's mean + 3 standard deviations."""
    found, columns = torch.zeros_like(attention), by_column(pictures)
    for sample, number in owners(pictures):
        at = columns[sample] == number
        own = attention[sample][at]
        if change == "permuted":
            stream = torch.Generator().manual_seed(zlib.crc32(ids[sample].encode()))
            found[sample, at] = own[torch.randperm(len(own), generator=stream).to(own.device)]
        else:
            sinks = own > own.mean() + 3 * own.std(correction=0)
            found[sample, at] = own * (sinks if change == "sinks_alone" else ~sinks)
    return found


def sampled(weights: Tensor, pictures: Tensor, keys: list[int], rows: int) -> tuple[Tensor, Tensor]:
    """Visual rows drawn by their weights, so that an L_iva over them alone has the mean of the whole one.

    `rows` systematic draws per image with one uniform, from a stream of its sample's key: how a batch is split changes
    nothing. An image of no more tokens than that keeps them all.

    Returns:
        (B, T) bool, the distinct rows drawn, and (n,) their weights, how often each was drawn over `rows`.
    """
    placed = weights.new_zeros(pictures.shape)
    placed[pictures > 0] = weights
    for sample, number in owners(pictures):
        at = pictures[sample] == number
        own = placed[sample, at]
        if len(own) > rows:
            first = random.Random(f"iva {keys[sample]} {number}").random()
            points = (torch.arange(rows, device=own.device, dtype=torch.float64) + first) / rows
            reached = own.double().cumsum(0)
            found = torch.searchsorted(reached / reached[-1], points, right=True)
            placed[sample, at] = found.bincount(minlength=len(own)).to(own.dtype) / rows
    drawn = placed > 0
    return drawn, placed[drawn]


def concentration(weights: Tensor, pictures: Tensor) -> dict[str, Tensor]:
    """Of (N,) `visual_weights`, summed over images: effective sample size 1 / sum w^2, and the share of the five highest."""
    placed = weights.new_zeros(pictures.shape)
    placed[pictures > 0] = weights
    of_image = torch.stack([placed[sample] * (pictures[sample] == number) for sample, number in owners(pictures)])
    top = of_image.topk(min(5, pictures.shape[1])).values.sum()
    effective = (1 / of_image.square().sum(1)).sum()
    return {"images": weights.new_tensor(len(of_image)), "effective_tokens": effective, "top5": top}


def uniform_attention(pictures: Tensor) -> Tensor:
    """(B, Nv) equal attention: the control of the weighting."""
    return (by_column(pictures) > 0).float()
