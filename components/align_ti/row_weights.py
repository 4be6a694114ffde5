"""Row weights for distillation losses, by name, and their normalisation and ranking within a sample."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from components.align_ti.batch import index_within, random_cycle
from components.align_ti.divergence import kl
from components.align_ti.ribbon import uniforms
from components.align_ti.step_outputs import StepOutputs

RowWeight = Callable[[Tensor, Tensor, Tensor], Tensor]  # teacher and student logits (n, V), gold tokens (n,) -> (n,)


def entropy(teacher: Tensor, student: Tensor, gold: Tensor) -> Tensor:
    """H(p_T) / log V: highest where the teacher is uncertain (EA-KD, arXiv 2311.13621)."""
    return _entropy(teacher)


def certainty(teacher: Tensor, student: Tensor, gold: Tensor) -> Tensor:
    """exp(-H(p_T) / log V): highest where the teacher is confident (GRACE, arXiv 2601.22709)."""
    return (-_entropy(teacher)).exp()


def confidence(teacher: Tensor, student: Tensor, gold: Tensor) -> Tensor:
    """1 - p_T(y): highest where the teacher gives the gold token a low probability (Bridge-Garden, arXiv 2605.26246)."""
    return 1 - torch.softmax(teacher, -1).gather(1, gold[:, None])[:, 0]


def unsure(teacher: Tensor, student: Tensor, gold: Tensor) -> Tensor:
    """H(p_S) / log V: highest where the student is uncertain (SE-KD, arXiv 2602.01395)."""
    return _entropy(student)


def accepted(teacher: Tensor, student: Tensor, gold: Tensor) -> Tensor:
    """1 where the student's top token is in the teacher's top five, else 0.01 (SelecTKD)."""
    matches = teacher.topk(5).indices == student.argmax(-1, keepdim=True)
    return torch.where(matches.any(-1), 1.0, 0.01).to(teacher.dtype)


def divergence(teacher: Tensor, student: Tensor, gold: Tensor) -> Tensor:
    """KL(p_T || p_S): highest where the two distributions differ most."""
    return kl(torch.log_softmax(teacher, -1), torch.log_softmax(student, -1))


ROW_WEIGHTS: dict[str, RowWeight] = {f.__name__: f for f in (entropy, certainty, confidence, unsure, accepted, divergence)}


def row_weight_function(name: str) -> RowWeight:
    """Row weight function by name. Raises ValueError listing the known names."""
    if name not in ROW_WEIGHTS:
        raise ValueError(f"row_weight {name!r} is none of {', '.join(ROW_WEIGHTS)} (components/align_ti/row_weights.py)")
    return ROW_WEIGHTS[name]


@torch.no_grad()
def row_weights(outputs: StepOutputs, name: str, visual: bool = False, shuffled: bool = False) -> Tensor:
    """(N,) weights at the rows that predict the response, or at the visual rows, without a gradient. Requires `live` in the
    term's needs.

    `shuffled`: control, each row that predicts the response has the weight of another row of its sample (`random_cycle`).
    """
    weight, rows = row_weight_function(name), outputs.batch.visual if visual else outputs.response_rows
    gold = outputs.batch.input_ids[rows] if visual else outputs.gold
    weights = outputs.rowwise(rows, lambda chunk, teacher, student: weight(teacher, student, gold[chunk]))
    return weights[random_cycle(outputs.sample, random_priority(outputs))] if shuffled else weights


def random_priority(outputs: StepOutputs) -> Tensor:
    """(N,) uniforms in [0, 1) at the rows that predict the response, seeded by each sample's key."""
    return uniforms(outputs.batch.response, [-3 - key for key in outputs.keys], 1)[:, 0]


def over_mean(weights: Tensor, sample: Tensor) -> Tensor:
    """(N,) weights divided by their mean over each sample, so that a sample's rows average 1."""
    size = sample.bincount()
    means = weights.new_zeros(len(size)).index_add_(0, sample, weights) / size
    return weights / means[sample].clamp_min(torch.finfo(weights.dtype).tiny)


def in_top(weights: Tensor, sample: Tensor, share: float) -> Tensor:
    """(N,) bool: the ceil(share R) rows of highest weight in each sample of R rows; ties go to the earlier row."""
    order = weights.argsort(descending=True, stable=True)
    order = order[sample[order].argsort(stable=True)]  # by sample, the order of `sample` itself, then by weight
    top = torch.empty_like(sample, dtype=torch.bool)
    # 0.6 of 25 rows are 15, though the product is above 15 in floats
    top[order] = index_within(sample) < (share * sample.bincount()[sample].double() - 1e-9).ceil()
    return top


def _entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1) / math.log(logits.shape[-1])
