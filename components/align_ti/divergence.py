"""Divergence between teacher and student per row, in nats; logits are computed in chunks of rows.

A row is a position at which both models predict a token. The caller selects rows before the head is applied, and the chunks
(head.py) bound memory to a few chunks of logits whatever the number of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from components.align_ti.head import CHUNK_MIB, Head, at_least_float32, row_losses, rows_per_chunk


@dataclass(frozen=True)
class Divergence:
    """Keyword arguments of `divergence`."""

    kind: str = "forward"
    mix: float = 0.5
    temperature: float = 1.0


def divergence(
    teacher_logits: Tensor, student_logits: Tensor, kind: str = "forward", mix: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Divergence D(p_T, p_S) per row.

    Args:
        teacher_logits: (N, V_T), cut to the shared prefix min(V_T, V_S) before the softmax.
        student_logits: (N, V_S), cut likewise.
        kind: forward KL(p_T || p_S); reverse KL(p_S || p_T); jsd, generalised Jensen-Shannon with beta = mix
            (arXiv 2306.13649, eq. 1: beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S; it vanishes
            as beta nears 0 or 1, which mean forward and reverse KL, as in TRL); skewed,
            KL(p_T || alpha p_T + (1 - alpha) p_S), and skewed_reverse, KL(p_S || alpha p_S + (1 - alpha) p_T), with
            alpha = mix (arXiv 2402.03898, eq. 3; DistiLLM-2 takes p_S inside its mixture without a gradient, not so here);
            argmax, the hard-label loss -log p_S(argmax p_T), which is not a divergence.
        temperature: divides the logits of both; no T^2 factor is applied.

    Returns:
        (N,) nats, in the wider of float32 and the logits' dtype.
    """
    shared = min(teacher_logits.shape[-1], student_logits.shape[-1])
    log_t = _log_softmax(teacher_logits[:, :shared], temperature)
    del teacher_logits  # frees one chunk of logits
    log_s = _log_softmax(student_logits[:, :shared], temperature)
    if kind == "forward" or (kind, mix) == ("jsd", 0):
        return kl(log_t, log_s)
    if kind == "reverse" or (kind, mix) == ("jsd", 1):
        return kl(log_s, log_t)
    if kind == "jsd":
        mixture = _log_mixture(log_t, log_s, mix)
        return mix * kl(log_t, mixture) + (1 - mix) * kl(log_s, mixture)
    if kind == "skewed":
        return kl(log_t, _log_mixture(log_t, log_s, mix))
    if kind == "skewed_reverse":
        return kl(log_s, _log_mixture(log_s, log_t, mix))
    if kind == "argmax":
        return -log_s.gather(-1, log_t.argmax(-1, keepdim=True))[:, 0]
    raise ValueError(f"unknown divergence {kind!r}: forward, reverse, jsd, skewed, skewed_reverse or argmax")


def row_divergence(
    teacher_rows: Tensor,
    teacher_head: Head,
    student_rows: Tensor,
    student_head: Head,
    *,
    kind: str = "forward",
    mix: float = 0.5,
    temperature: float = 1.0,
    shared: int | None = None,
    weights: Tensor | None = None,
    chunk_mib: float = CHUNK_MIB,
) -> Tensor:
    """(N,) `divergence` of hidden rows (N, d_T) and (N, d_S) through their heads; with `weights` (N,), their weighted sum ().

    Args:
        shared: size of the shared vocabulary, in columns of both heads; None: the narrower head's.
        chunk_mib: budget in MiB for one model's float32 logits of one chunk of rows.

    Gradients flow to the student's rows and head, none to the teacher.
    """

    def chunk_divergence(chunk: slice, student_logits: Tensor) -> Tensor:
        return divergence(
            _without_gradient(teacher_head, teacher_rows[chunk])[:, :shared], student_logits[:, :shared], kind, mix, temperature
        )

    size = rows_per_chunk(max(len(teacher_head.weight), len(student_head.weight)), chunk_mib)
    return row_losses(student_rows, student_head, chunk_divergence, size, weights)


@torch.no_grad()
def _without_gradient(head: Head, rows: Tensor) -> Tensor:
    return head(rows)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row; a masked vocabulary entry (log p = -inf) contributes 0 to the value and the gradient."""
    return (log_p.exp() * (log_p - log_q).masked_fill_(log_p == -math.inf, 0.0)).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), 0 <= share < 1, in log space against underflow; finite where both are masked (-inf), whose
    gradient would be NaN."""
    if share == 0:
        return log_q
    lowest = torch.finfo(log_p.dtype).min
    return torch.logaddexp(log_p.clamp_min(lowest) + math.log(share), log_q.clamp_min(lowest) + math.log1p(-share))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(at_least_float32(logits.dtype))
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
