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
    own_images = teacher is not None and grids(teacher, loaded) is not None
    shared = None if teacher is None else check_pair(teacher, loaded, own_images=own_images)
    collator = Collator(
        loaded.processor, template, sys.maxsize, train=True, teacher=teacher.processor if teacher and own_images else None
    )
    student_vlm, teacher_vlm = VLM(loaded.model), None if teacher is None else VLM(teacher.model)
    by_row: dict[int, Likelihood] = {}
    order = sorted(rows, key=lambda row: len(samples[row].turns[0].answer), reverse=True)
    for start in tqdm(range(0, len(order), batch_size), desc=title, unit="batch"):
        batch_rows = order[start : start + batch_size]
        batch = collator([samples[row].upto(1) for row in batch_rows]).to(loaded.model.device)
        mask = predicting(batch.response)
        hidden = student_vlm.plain(batch, student_vlm.features(batch), keep=False)[0][mask]
        nats = _nats(hidden, student_vlm, batch.input_ids[batch.response])
        kl: list[float] | list[None] = [None] * len(batch_rows)
        if teacher_vlm is not None:
            teacher_batch = batch.teacher or batch
            teacher_mask = predicting(teacher_batch.response)
            teacher_hidden = teacher_vlm.plain(teacher_batch, teacher_vlm.features(teacher_batch), keep=False)[0][teacher_mask]
            divergence = row_divergence(teacher_hidden, teacher_vlm.head, hidden, student_vlm.head, shared=shared)
            kl = _sum_per_sample(divergence, mask)
        tokens = mask.sum(1).tolist()
        for row, count, total_nats, total_kl in zip(batch_rows, tokens, _sum_per_sample(nats, mask), kl, strict=True):
            if not math.isfinite(total_nats + (total_kl or 0.0)):
                raise ModelError(
                    f"{title}: the answer of sample {samples[row].id} costs {total_nats} nats, KL {total_kl}: weights that are"
                    " not finite, or overflow in this precision"
                )
            by_row[row] = Likelihood(id=samples[row].id, tokens=count, nats=total_nats, kl=total_kl)
    return [by_row[row] for row in rows]


def nats_per_token(references: Iterable[Likelihood]) -> float:
    """Mean negative log-likelihood over all tokens."""
    scores = list(references)
    return sum(score.nats for score in scores) / sum(score.tokens for score in scores)


def kl_per_token(references: Iterable[Likelihood]) -> float | None:
    """Mean KL from the teacher over all tokens; None for the teacher itself."""
    pairs = [(reference.kl, reference.tokens) for reference in references]
    with_kl = [(kl, tokens) for kl, tokens in pairs if kl is not None]
    return sum(kl for kl, _ in with_kl) / sum(tokens for _, tokens in with_kl) if with_kl else None


def _nats(hidden: Tensor, vlm: VLM, targets: Tensor) -> Tensor:
    """(N,) cross-entropies of hidden states (N, d) against (N,) targets."""
    size = rows_per_chunk(len(vlm.head.weight), CHUNK_MIB)
    return row_losses(hidden, vlm.head, lambda chunk, logits: F.cross_entropy(logits, targets[chunk], reduction="none"), size)


def _sum_per_sample(values: Tensor, mask: Tensor) -> list[float]:
    """(N,) values at the positions of a (B, T) mask, summed per sample; rounded to a millionth of a nat."""
    per_sample = torch.zeros(len(mask), dtype=torch.float64)
    per_sample.index_add_(0, mask.nonzero()[:, 0].cpu(), values.double().cpu())
    return [round(value, 6) for value in per_sample.tolist()]
