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
    parts: dict[Kind, list[Tensor]] = {"text": [], "visual": []}
    subset = _evenly_spaced(samples)
    for start in tqdm(range(0, len(subset), batch_size), desc="its error", unit="batch"):
        batch, teacher_hidden, _ = teacher_pass.forward(subset[start : start + batch_size])
        cached, _ = signals.look_up(batch, visual=True, with_attention=False)
        with torch.inference_mode():
            student_hidden, _ = student.plain(batch, student.features(batch), keep=False)
        masks: dict[Kind, Tensor] = {"text": predicting(batch.response), "visual": batch.visual}
        for kind, rows in masks.items():
            parts[kind].append(_errors(teacher_pass, cached.at(rows), teacher_hidden[rows], student, student_hidden[rows]))
    errors = {kind: torch.cat(chunks, dim=1) for kind, chunks in parts.items()}
    return {kind: _summary(name, rows) for kind, rows in errors.items() if rows.shape[1]}


@torch.inference_mode()
def _errors(
    teacher_pass: TeacherPass, cached_rows: Rows, teacher_hidden: Tensor, student: VLM, student_hidden: Tensor
) -> Tensor:
    """(3, N): KL from the cache, exact KL, and the teacher's residual mass beyond top-k, 0 for sampled caches."""
    parts = []
    for start in range(0, len(student_hidden), teacher_pass.chunk_rows):
        chunk = slice(start, start + teacher_pass.chunk_rows)
        teacher_logits, student_logits = (
            vlm.head(hidden[chunk])[:, : teacher_pass.shared_vocabulary]
            for vlm, hidden in ((teacher_pass.vlm, teacher_hidden), (student, student_hidden))
        )
        temperature = teacher_pass.facts.temperature
        rows = cached_rows[chunk]
        approximate = rows.divergence(student_logits, temperature)
        exact = divergence(teacher_logits, student_logits, temperature=temperature)
        tail_mass = rows.log_tail.exp() if isinstance(rows, TopK) else torch.zeros_like(exact)
        parts.append(torch.stack([approximate, exact, tail_mass]).cpu())
    return torch.cat([torch.empty(3, 0), *parts], dim=1)


def _summary(student: str, rows: Tensor) -> Approximation:
    cached, exact, tail_mass = rows.double()
    error = (cached - exact).abs()
    return Approximation(
        student=student,
        rows=len(exact),
        kl=float(exact.mean()),
        mean_error=float(error.mean()),
        max_error=float(error.max()),
        relative_error=float(error.sum() / exact.sum()) if exact.sum() else 0.0,
        bias=float((cached - exact).mean()),
        mean_mass_beyond=float(tail_mass.mean()),
        max_mass_beyond=float(tail_mass.max()),
    )


def _evenly_spaced(samples: Samples) -> list[Sample]:
    instructions = [index for index, kind in enumerate(samples.kinds) if kind != CAPTION]
    return [samples[index] for index in instructions[:: max(1, len(instructions) // SAMPLES)]]
