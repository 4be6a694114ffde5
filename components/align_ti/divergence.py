"""Divergence between teacher and student, one number in nats per row, without ever holding all rows' logits.

A row is a position at which both models predict a token. Rows are chosen by the caller before any head is applied; the
driver then works through them in chunks under activation checkpointing, so that its memory is one chunk of logits
whatever the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # hidden (N, d) -> logits (N, V), float32


def divergence(
    teacher_logits: Tensor, student_logits: Tensor, kind: str = "forward", mix: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """D(p_T, p_S) per row.

    Args:
        teacher_logits, student_logits: (N, V_T) and (N, V_S); both are cut to the shared prefix min(V_T, V_S) before the
            softmax (METHOD.md, "Shared vocabulary").
        kind: forward KL(p_T || p_S); reverse KL(p_S || p_T); jsd, generalised Jensen-Shannon with beta = mix
            (arXiv 2306.13649, eq. 1: beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S); skewed,
            KL(p_T || alpha p_T + (1 - alpha) p_S) with alpha = mix (arXiv 2402.03898, eq. 3).
        temperature: both logits are divided by it; no T^2 factor is applied.

    Returns:
        (N,) nats, in the wider of float32 and the logits' dtype.
    """
    shared = min(teacher_logits.shape[-1], student_logits.shape[-1])
    log_t, log_s = (
        torch.log_softmax(logits[:, :shared].to(_at_least_float32(logits.dtype)) / temperature, dim=-1)
        for logits in (teacher_logits, student_logits)
    )
    if kind == "forward":
        return kl(log_t, log_s)
    if kind == "reverse":
        return kl(log_s, log_t)
    if kind == "jsd":
        middle = _log_mixture(log_t, log_s, mix)
        return mix * kl(log_t, middle) + (1 - mix) * kl(log_s, middle)
    if kind == "skewed":
        return kl(log_t, _log_mixture(log_t, log_s, mix))
    raise ValueError(f"unknown divergence {kind!r}: forward, reverse, jsd or skewed")


def row_divergence(
    teacher_rows: Tensor,
    teacher_head: Head,
    student_rows: Tensor,
    student_head: Head,
    *,
    kind: str = "forward",
    mix: float = 0.5,
    temperature: float = 1.0,
    chunk_rows: int = 4096,
) -> Tensor:
    """`divergence` of hidden rows (N, d_T) and (N, d_S) through their heads, `chunk_rows` rows at a time.

    Gradients reach the student's rows and head; the teacher gets none.
    """

    def of_chunk(at: slice, student_logits: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_rows[at])
        return divergence(teacher_logits, student_logits, kind, mix, temperature)

    return row_losses(student_rows, student_head, of_chunk, chunk_rows)


def row_losses(rows: Tensor, head: Head, loss: Callable[[slice, Tensor], Tensor], size: int) -> Tensor:
    """(N,) losses of the logits of hidden rows (N, d), `size` rows at a time.

    Args:
        loss: of a slice of the rows and its logits (n, V), one number per row.

    More than one chunk: each chunk's logits are recomputed in the backward pass instead of kept.
    """
    if len(rows) <= size:
        return loss(slice(None), head(rows))

    def chunk(start: int) -> Tensor:
        at = slice(start, start + size)
        return loss(at, head(rows[at]))

    return torch.cat([checkpoint(chunk, start, use_reentrant=False) for start in range(0, len(rows), size)])


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row; a masked vocabulary entry (log p = -inf) adds 0, to the gradient too."""
    return (log_p.exp() * (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), in log space so that no probability underflows."""
    if share in (0.0, 1.0):
        return log_p if share else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
