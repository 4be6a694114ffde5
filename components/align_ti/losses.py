"""The four terms of Align-TI as sums over their own units; the caller divides by counts over the global batch.

L = w_sft L_sft + w_kd L_kd + w_iva L_iva + w_tpa L_tpa (METHOD.md, "Total"; arXiv 2602.09483). A term is a sum and a count
because a mean of means would depend on how the batch was split over devices and accumulation steps.
"""

from __future__ import annotations

from torch import Tensor

from components.align_ti.head import CHUNK_MIB, Head, cross_entropy

TERMS = ("sft", "kd", "iva", "tpa")


def sft(rows: Tensor, head: Head, targets: Tensor, chunk_mib: float = CHUNK_MIB) -> Tensor:
    """Sum of cross-entropies, hidden rows (N, d) against the N response tokens they predict. Units: response tokens."""
    return cross_entropy(rows, head, targets, chunk_mib)


def kd(text_divergence: Tensor, predicts: Tensor) -> Tensor:
    """Sum of D(p_T, p_S) over the rows that predict y_1..y_R; both (N,). Units: response tokens."""
    return text_divergence[predicts].sum()


def tpa(text_divergence: Tensor, gold_hits: Tensor, ribbon_divergence: Tensor, multiplicity: Tensor) -> Tensor:
    """Sum over counted draws of D after the draw. Units: counted draws.

    Args:
        text_divergence, gold_hits: (N,), rows of the plain pass and how often the gold token there was drawn.
        ribbon_divergence, multiplicity: (M,), rows of distinct other draws and how often each was drawn.
    """
    return (gold_hits * text_divergence).sum() + (multiplicity * ribbon_divergence).sum()


def total(sums: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
    """L from (4,) sums, (4,) counts over the global batch and (4,) weights, in the order of TERMS.

    A term without units (no image in the whole batch, every draw EOS) is 0.
    """
    return (weights * sums / counts.clamp_min(1)).sum()
