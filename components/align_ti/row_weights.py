"""Weights of L_kd's rows by name: functions of the teacher's and the student's logits (n, V) and the gold tokens (n,).

Each returns (n,) weights, at most 1. They carry no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

RowWeight = Callable[[Tensor, Tensor, Tensor], Tensor]


def entropy(teacher: Tensor, student: Tensor, gold: Tensor) -> Tensor:
    """H(p_T) / log V: rows of which the teacher itself is unsure weigh most (EA-KD, arXiv 2311.13621)."""
    log_p = torch.log_softmax(teacher, -1)
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1) / math.log(teacher.shape[-1])


def confidence(teacher: Tensor, student: Tensor, gold: Tensor) -> Tensor:
    """1 - p_T(y): soft targets where the teacher doubts the gold token (Bridge-Garden, arXiv 2605.26246)."""
    return 1 - torch.softmax(teacher, -1).gather(1, gold[:, None])[:, 0]


ROW_WEIGHTS: dict[str, RowWeight] = {"entropy": entropy, "confidence": confidence}


def weight_called(name: str) -> RowWeight:
    """Raises ValueError listing the names that there are."""
    if name not in ROW_WEIGHTS:
        raise ValueError(f"row_weight {name!r} is none of {', '.join(ROW_WEIGHTS)} (components/align_ti/row_weights.py)")
    return ROW_WEIGHTS[name]
