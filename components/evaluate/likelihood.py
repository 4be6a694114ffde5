"""Teacher-forced scores: the reference's negative log-likelihood, and the KL divergence from the teacher along it.

Exact match scores the greedy answer alone; these use the whole distribution at each token of the reference, EOS included, so
they separate models with equal answers. Both are exact: the whole shared vocabulary, and a live teacher, which costs a teacher
forward pass per batch and its weights' memory beside the student's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from components.align_ti.batch import predicting
from components.align_ti.divergence import row_divergence
from components.align_ti.head import CHUNK_MIB, row_losses, rows_per_chunk
from components.dataset.shards import Sample
from components.errors import ModelError
from components.models.collate import Collator
from components.models.load import Loaded, check_pair, grids
from components.models.template import Template
from components.models.vlm import VLM
from components.records.evaluate import Likelihood


@torch.inference_mode()
def likelihoods(
    loaded: Loaded,
    samples: Sequence[Sample],
    rows: Sequence[int],
    template: Template,
    batch_size: int,
    title: str,
    teacher: Loaded | None = None,
) -> list[Likelihood]:
    """Likelihoods of the reference to each sample's first question, in the order of `rows`; batches group similar lengths.

    Raises ModelError if student and teacher cannot be compared token by token (components/models/load.py), or a model's
    probabilities are not finite.
    """
    apart = teacher is not None and grids(teacher, loaded) is not None
    shared = None if teacher is None else check_pair(teacher, loaded, own_images=apart)
    collator = Collator(
        loaded.processor, template, sys.maxsize, train=True, teacher=teacher.processor if teacher and apart else None
    )
    view, of_teacher = VLM(loaded.model), None if teacher is None else VLM(teacher.model)
    found: dict[int, Likelihood] = {}
    order = sorted(rows, key=lambda row: len(samples[row].turns[0].answer), reverse=True)
    for start in tqdm(range(0, len(order), batch_size), desc=title, unit="batch"):
        these = order[start : start + batch_size]
        batch = collator([samples[row].upto(1) for row in these]).to(loaded.model.device)
        at = predicting(batch.response)
        hidden = view.plain(batch, view.features(batch), keep=False)[0][at]
        nats = _nats(hidden, view, batch.input_ids[batch.response])
        kl: list[float] | list[None] = [None] * len(these)
        if of_teacher is not None:
            theirs = batch.teacher or batch
            rows_of_teacher = of_teacher.plain(theirs, of_teacher.features(theirs), keep=False)[0][predicting(theirs.response)]
            kl = _summed(row_divergence(rows_of_teacher, of_teacher.head, hidden, view.head, shared=shared), at)
        tokens = at.sum(1).tolist()
        for row, count, cost, gap in zip(these, tokens, _summed(nats, at), kl, strict=True):
            if not math.isfinite(cost + (gap or 0.0)):
                raise ModelError(
                    f"{title}: the answer of sample {samples[row].id} costs {cost} nats, KL {gap}: weights that are not finite,"
                    " or overflow in this precision"
                )
            found[row] = Likelihood(id=samples[row].id, tokens=count, nats=cost, kl=gap)
    return [found[row] for row in rows]


def nats_per_token(found: Iterable[Likelihood]) -> float:
    """Mean negative log-likelihood over all tokens."""
    costs = list(found)
    return sum(one.nats for one in costs) / sum(one.tokens for one in costs)


def kl_per_token(found: Iterable[Likelihood]) -> float | None:
    """Mean KL from the teacher over all tokens; None for the teacher itself."""
    gaps = [(one.kl, one.tokens) for one in found]
    known = [(kl, tokens) for kl, tokens in gaps if kl is not None]
    return sum(kl for kl, _ in known) / sum(tokens for _, tokens in known) if known else None


def _nats(hidden: Tensor, view: VLM, targets: Tensor) -> Tensor:
    """(N,) cross-entropies of hidden states (N, d) against (N,) targets."""
    size = rows_per_chunk(len(view.head.weight), CHUNK_MIB)
    return row_losses(hidden, view.head, lambda at, logits: F.cross_entropy(logits, targets[at], reduction="none"), size)


def _summed(values: Tensor, at: Tensor) -> list[float]:
    """(N,) values at the positions of a (B, T) mask, summed per sample; rounded to a millionth of a nat."""
    per_sample = torch.zeros(len(at), dtype=torch.float64)
    per_sample.index_add_(0, at.nonzero()[:, 0].cpu(), values.double().cpu())
    return [round(value, 6) for value in per_sample.tolist()]
