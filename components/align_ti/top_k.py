"""Cached teacher distribution per row: top-k log-probabilities, and the log of the residual mass.

The residual mass counts as one more outcome, so the divergence is KL(p_T || p_S) of coarser distributions: at most the exact
one (data-processing inequality), and equal to it for k = V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from components.align_ti.cached import Rows
from components.align_ti.divergence import kl


@dataclass(frozen=True)
class TopK(Rows):
    """Top-k of p_T, tokens in descending order of probability."""

    log_probs: Tensor  # (N, k)
    log_tail: Tensor  # (N,) log of the residual mass; -inf where k = V

    def divergence(self, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """(N,) sum_topk p_T (log p_T - log p_S) + tail_T (log tail_T - log tail_S) per row, tail_S the student's mass outside
        the teacher's top k."""
        logits = student_logits / temperature
        top_logits = logits.gather(-1, self.tokens)
        if top_logits.shape[-1] == logits.shape[-1]:
            return kl(self.log_probs, torch.log_softmax(top_logits, dim=-1))
        tail_logits = logits.scatter(-1, self.tokens, -torch.inf).logsumexp(-1, keepdim=True)
        log_s = torch.log_softmax(torch.cat([top_logits, tail_logits], dim=-1), dim=-1)
        return kl(torch.cat([self.log_probs, self.log_tail[:, None]], dim=-1), log_s)


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Top-k of (N, V) logits cut to the shared vocabulary; all V if k > V.

    The residual mass is summed over its own tokens: 1 - sum(top) would lose a small one to rounding.
    """
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    log_probs, tokens = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    return TopK(tokens, log_probs, log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1))


def with_residual(p: Tensor, tokens: Tensor) -> Tensor:
    """(N, k + 1) probabilities of `tokens` (N, k) under p (N, V), and the residual mass of all others."""
    return torch.cat([p.gather(1, tokens), p.scatter(1, tokens, 0.0).sum(1, keepdim=True)], dim=1)


def decoupled(teacher: Tensor, student: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decomposition of KL(p_T || p_S) of (N, V) logits at (N, k) tokens into D1 + a D2.

    Returns (N,) each: D1, KL over those tokens plus the residual mass; D2, KL within the residual; a, its mass under p_T.
    """
    shared = min(teacher.shape[-1], student.shape[-1])
    log_p, log_q = (logits[:, :shared].log_softmax(-1).scatter(-1, tokens, -torch.inf) for logits in (teacher, student))
    tail_p, tail_q = (tail.logsumexp(-1, keepdim=True) for tail in (log_p, log_q))
    teacher_top = TopK(tokens, teacher[:, :shared].log_softmax(-1).gather(-1, tokens), tail_p[:, 0])
    return teacher_top.divergence(student[:, :shared]), kl(log_p - tail_p, log_q - tail_q), tail_p[:, 0].exp()
