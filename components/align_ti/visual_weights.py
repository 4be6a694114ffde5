"""Weights of an image's visual rows in L_iva."""

from __future__ import annotations

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


def uniform_attention(visual: Tensor) -> Tensor:
    """(B, Nv) equal attention: the control of the weighting."""
    owned = torch.arange(int(visual.sum(1).max()), device=visual.device) < visual.sum(1, keepdim=True)
    return owned.float()
