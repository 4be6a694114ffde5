"""Cached teacher distribution per row: draws from p_T, and its entropy.

Forward KL is linear in p_T apart from the entropy, so draws give an unbiased value and gradient, unlike a cut at k tokens.
Source: Sparse Logit Sampling (arXiv 2503.16870), whose draws are independent; systematic draws, used here, keep each token's
count within one of its expectation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from components.align_ti.cached import Rows


@dataclass(frozen=True)
class Sampled(Rows):
    """Sampled p_T. k is the largest number of distinct tokens in a row."""

    counts: Tensor  # (N, k) draws of each token; 0 is padding
    entropy: Tensor  # (N,) entropy of p_T, nats

    def divergence(self, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """(N,) sum_v (count_v / draws) (-log p_S(v)) - H(p_T) per row; a row can be below 0, its mean over draws cannot."""
        logits = student_logits / temperature
        shares = self.counts.to(logits.dtype) / self.counts.sum(-1, keepdim=True)
        return logits.logsumexp(-1) - (shares * logits.gather(-1, self.tokens)).sum(-1) - self.entropy


def sampled(logits: Tensor, draws: int, uniform: Tensor, temperature: float = 1.0) -> Sampled:
    """Systematic draws from (N, V) logits cut to the shared vocabulary, with one `uniform` (N,) per row."""
    p = torch.softmax(logits / temperature, dim=-1)
    cumulative = p.double().cumsum(-1)
    points = (torch.arange(draws, device=p.device) + uniform.to(p.device, torch.float64)[:, None]) / draws
    drawn = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True).clamp_max(p.shape[-1] - 1)
    slot = drawn.diff(prepend=drawn[:, :1]).sign().cumsum(-1)  # index among the row's distinct tokens
    counts = torch.zeros_like(drawn).scatter_add(-1, slot, torch.ones_like(drawn))
    k = int(slot.max()) + 1 if len(slot) else 0
    return Sampled(torch.zeros_like(drawn).scatter(-1, slot, drawn)[:, :k], counts[:, :k], torch.special.entr(p).sum(-1))
