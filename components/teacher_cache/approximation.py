"""Approximation error of the cache: KL(p_T || p_S) from cached against full distributions, on the same rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from components.align_ti.batch import predicting
from components.align_ti.cached import Rows
from components.align_ti.divergence import divergence
from components.align_ti.top_k import TopK
from components.dataset.shards import CAPTION, Sample, Samples
from components.models.vlm import VLM
from components.records.teacher_cache import Approximation
from components.teacher_cache.build import TeacherPass
from components.teacher_cache.store import Signals

SAMPLES = 256  # samples measured, evenly spaced over the split; up to twice as many for an even stride


Kind = Literal["text", "visual"]


def measure(
    teacher_pass: TeacherPass, signals: Signals, samples: Samples, student: VLM, name: str, batch_size: int
) -> dict[Kind, Approximation]:
    """Approximation error per kind of rows, on a subset read back from the cache; a kind without rows is left out."""
    found: dict[Kind, list[Tensor]] = {"text": [], "visual": []}
    chosen = _spread(samples)
    for start in tqdm(range(0, len(chosen), batch_size), desc="its error", unit="batch"):
        batch, hidden, _ = teacher_pass.forward(chosen[start : start + batch_size])
        known, _ = signals.look_up(batch, visual=True, with_attention=False)
        with torch.inference_mode():
            mine, _ = student.plain(batch, student.features(batch), keep=False)
        masks: dict[Kind, Tensor] = {"text": predicting(batch.response), "visual": batch.visual}
        for kind, rows in masks.items():
            found[kind].append(_rows(teacher_pass, known.at(rows), hidden[rows], student, mine[rows]))
    whole = {kind: torch.cat(parts, dim=1) for kind, parts in found.items()}
    return {kind: _summary(name, rows) for kind, rows in whole.items() if rows.shape[1]}


@torch.inference_mode()
def _rows(teacher_pass: TeacherPass, kept: Rows, theirs: Tensor, student: VLM, mine: Tensor) -> Tensor:
    """(3, N): KL from the cache, exact KL, and the teacher's residual mass beyond top-k, 0 for sampled caches."""
    parts = []
    for start in range(0, len(mine), teacher_pass.chunk_rows):
        at = slice(start, start + teacher_pass.chunk_rows)
        their_logits, my_logits = (
            vlm.head(rows[at])[:, : teacher_pass.shared_vocabulary]
            for vlm, rows in ((teacher_pass.vlm, theirs), (student, mine))
        )
        temperature = teacher_pass.facts.temperature
        word = kept[at]
        cached = word.divergence(my_logits, temperature)
        exact = divergence(their_logits, my_logits, temperature=temperature)
        beyond = word.log_tail.exp() if isinstance(word, TopK) else torch.zeros_like(exact)
        parts.append(torch.stack([cached, exact, beyond]).cpu())
    return torch.cat([torch.empty(3, 0), *parts], dim=1)


def _summary(student: str, rows: Tensor) -> Approximation:
    cached, exact, beyond = rows.double()
    error = (cached - exact).abs()
    return Approximation(
        student=student,
        rows=len(exact),
        kl=float(exact.mean()),
        mean_error=float(error.mean()),
        max_error=float(error.max()),
        relative_error=float(error.sum() / exact.sum()) if exact.sum() else 0.0,
        bias=float((cached - exact).mean()),
        mean_mass_beyond=float(beyond.mean()),
        max_mass_beyond=float(beyond.max()),
    )


def _spread(samples: Samples) -> list[Sample]:
    instructions = [index for index, kind in enumerate(samples.kinds) if kind != CAPTION]
    return [samples[index] for index in instructions[:: max(1, len(instructions) // SAMPLES)]]
