"""Weights of visual rows in L_iva, their controls, and subsampling by weight."""

from __future__ import annotations

import random
from typing import Literal

import torch
from torch import Tensor

from components.align_ti.batch import by_column, image_indices, permutation


def visual_weights(attention: Tensor, pictures: Tensor) -> Tensor:
    """(N,) weights w_i of L_iva = sum_i w_i D(p_T(.|v_<=i), p_S(.|v_<=i)) over the visual rows of all images. Units: images.

    Attention (B, Nv), zero on padding, normalised to sum 1 per image. An image without attention, such as one that no
    instruction token follows, gets uniform weights.

    Args:
        pictures: (B, T) long, `Batch.pictures`. Nv is the largest number of visual tokens in a sample.

    Returns:
        (N,) weights of the batch's visual rows, ordered by (sample, position).
    """
    columns = by_column(pictures)
    weights = torch.zeros_like(attention)
    for number in range(1, int(columns.max()) + 1 if columns.numel() else 1):
        in_image = (columns == number).to(attention.dtype)
        image_attention = attention * in_image
        image_attention = torch.where(image_attention.sum(1, keepdim=True) > 0, image_attention, in_image)
        weights = weights + image_attention / image_attention.sum(1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)
    return weights[columns > 0]


Change = Literal["permuted", "sinks_removed", "sinks_alone"]


def changed(attention: Tensor, pictures: Tensor, ids: list[str], change: Change) -> Tensor:
    """(B, Nv) attention, within each image permuted (seeded by `ids`), without its sinks, or reduced to its sinks.

    A sink has attention above its image's mean + 3 standard deviations."""
    result, columns = torch.zeros_like(attention), by_column(pictures)
    for sample, number in image_indices(pictures):
        in_image = columns[sample] == number
        image_attention = attention[sample][in_image]
        if change == "permuted":
            result[sample, in_image] = image_attention[permutation(len(image_attention), ids[sample])]
        else:
            sinks = image_attention > image_attention.mean() + 3 * image_attention.std(correction=0)
            result[sample, in_image] = image_attention * (sinks if change == "sinks_alone" else ~sinks)
    return result


def sampled(weights: Tensor, pictures: Tensor, keys: list[int], rows: int) -> tuple[Tensor, Tensor]:
    """Subsample of visual rows, drawn by weight: L_iva over it is an unbiased estimate of the full one.

    `rows` systematic draws per image with one uniform, seeded by the sample's key, so that the split of a batch changes
    nothing. An image of at most `rows` tokens keeps its weights.

    Returns:
        (B, T) bool mask of the distinct rows with a weight, and (n,) their weights: draws / `rows`.
    """
    dense = weights.new_zeros(pictures.shape).masked_scatter(pictures > 0, weights)
    for sample, number in image_indices(pictures):
        in_image = pictures[sample] == number
        image_weights = dense[sample, in_image]
        if len(image_weights) > rows:
            offset = random.Random(f"iva {keys[sample]} {number}").random()
            points = (torch.arange(rows, device=image_weights.device, dtype=torch.float64) + offset) / rows
            cumulative = image_weights.double().cumsum(0)
            drawn_rows = torch.searchsorted(cumulative / cumulative[-1], points, right=True)
            dense[sample, in_image] = drawn_rows.bincount(minlength=len(image_weights)).to(image_weights.dtype) / rows
    drawn = dense > 0
    return drawn, dense[drawn]


def concentration(weights: Tensor, pictures: Tensor) -> dict[str, Tensor]:
    """Concentration of (N,) `visual_weights`, summed over images: effective sample size 1 / sum w^2, and top-5 share."""
    dense = weights.new_zeros(pictures.shape).masked_scatter(pictures > 0, weights)
    per_image = torch.stack([dense[sample] * (pictures[sample] == number) for sample, number in image_indices(pictures)])
    top = per_image.topk(min(5, pictures.shape[1])).values.sum()
    effective = (1 / per_image.square().sum(1)).sum()
    return {"images": weights.new_tensor(len(per_image)), "effective_tokens": effective, "top5": top}


def uniform_attention(pictures: Tensor) -> Tensor:
    """(B, Nv) uniform attention, the control of the weighting."""
    return (by_column(pictures) > 0).float()
