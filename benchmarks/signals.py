"""Gradients from cached signals and from drawn visual rows against the exact ones: `python -m benchmarks.signals --size digits`

Sizes: digits, the pair that `make repro` left under artifacts/, 32 training samples; small, random models whose teacher is
sharpened to the entropy of a language model, the student distilled on the batch until it is near. For the rows of L_kd
and of L_iva: the angle to the exact gradient of all trained parameters, the norm over its norm, and bytes per row of a cache
whose token ids take four; for `iva.rows` the noise |g - exact| / |exact|, of one draw on average and of the mean over all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, table
from benchmarks.shapes import SIZES
from benchmarks.step import KD_ONLY, Bench
from components.align_ti.batch import predicting
from components.align_ti.cached import Rows, cached_row_divergence
from components.align_ti.divergence import row_divergence
from components.align_ti.sampled import Sampled, sampled
from components.align_ti.top_k import TopK, top_k
from components.align_ti.visual_weights import sampled as drawn_rows
from components.align_ti.visual_weights import visual_weights
from components.distill.teacher import FrozenTeacher
from components.models.vlm import VLM

CUTS, DRAWS = (8, 12, 32), 50
SHARPER, STEPS, RATE = 4.0, 30, 1e-4  # size small: scale of logits; steps of exact KD; AdamW's learning rate
Pair = tuple[VLM, FrozenTeacher, Any, int, int]  # student, teacher, batch, shared vocabulary, visual rows drawn per image


def digits(student_folder: Path, samples: int = 32) -> Pair:
    """Trained pair of the digits recipe; half of an image's rows are drawn."""
    from components.config.load import load_settings
    from components.dataset.shards import CAPTION, Samples
    from components.models.collate import Collator
    from components.models.load import check_pair, load
    from components.models.template import Template
    from components.records.irs import LayerChoice
    from components.records.paths import DATASET, IRS, ROWS, TEACHER
    from components.records.teacher import TeacherChoice

    settings = load_settings()
    teacher, student = load(Path(TeacherChoice.read(TEACHER / "choice.json").path), "cpu"), load(student_folder, "cpu")
    student.model.model.vision_tower.requires_grad_(False)
    data = Samples(DATASET, "train", ROWS)
    question_rows = [i for i, kind in enumerate(data.kinds) if kind != CAPTION]
    chosen_samples = [data[i] for i in question_rows[:: len(question_rows) // samples][:samples]]
    collator = Collator(
        teacher.processor, Template.from_settings(settings.models.template), settings.models.max_length, train=True
    )
    frozen = FrozenTeacher(VLM(teacher.model), LayerChoice.read(IRS / "layer.json").layer, shares_tower=False)
    batch = collator(chosen_samples)
    rows = int(batch.visual.sum()) // len(chosen_samples) // 2
    return VLM(student.model), frozen, batch, check_pair(teacher, student), rows


def small() -> Pair:
    """Random models; 64 of 100 rows drawn."""
    bench = Bench(SIZES["small"], torch.device("cpu"))
    with torch.no_grad():
        bench.teacher.vlm.model.model.language_model.norm.weight *= SHARPER
        bench.student.model.model.language_model.norm.weight *= SHARPER
    bench.optimiser.param_groups[0]["lr"] = RATE
    loss = bench.loss("kd and iva", bench.method(KD_ONLY | {"iva": 1.0}))
    for _ in range(STEPS):
        bench.optimise(loss)
    return bench.student, bench.teacher, bench.batch, bench.size.student.vocabulary, 64


def run(name: str, pair: Pair, row_draws: int) -> dict[str, Any]:
    student, teacher, batch, shared, count = pair
    parameters = [p for p in student.parameters() if p.requires_grad]
    hidden, _ = student.plain(batch, student.features(batch), keep=False)
    with torch.no_grad():
        teacher_hidden, _, attention = teacher.plain(batch, teacher.features(batch, None), keep=False, with_attention=True)
    assert attention is not None
    weights = visual_weights(attention, batch.pictures)
    arms: dict[str, dict[str, Any]] = {}

    def gradient(loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([part.double().flatten() for part in gradients if part is not None])

    def compared(loss: Tensor, exact: Tensor) -> dict[str, float]:
        approximate_gradient = gradient(loss)
        cosine = float(torch.dot(approximate_gradient, exact) / approximate_gradient.norm() / exact.norm())
        return {"angle": math.degrees(math.acos(min(1.0, cosine))), "norm": float(approximate_gradient.norm() / exact.norm())}

    approximations: dict[str, Callable[[Tensor], Rows]] = {f"top {k} + tail": partial(top_k, k=k) for k in CUTS}
    approximations[f"top {CUTS[-1]} alone"] = top_k_alone
    generator = torch.Generator().manual_seed(0)
    approximations[f"{DRAWS} draws"] = lambda z: sampled(z, DRAWS, torch.rand(len(z), generator=generator, dtype=torch.float64))
    masks = {"text": (predicting(batch.response), None), "visual": (batch.visual, weights)}
    for kind, (rows, weigh) in masks.items():
        row_weights = torch.ones(int(rows.sum())) if weigh is None else weigh
        exact = gradient(
            row_divergence(teacher_hidden[rows], teacher.head, hidden[rows], student.head, shared=shared, weights=row_weights)
        )
        for approximation, approximate in approximations.items():
            cached_rows = approximate(teacher.head(teacher_hidden[rows])[:, :shared].detach())
            loss = cached_row_divergence(cached_rows, hidden[rows], student.head, shared=shared, weights=row_weights)
            arms[f"{kind}: {approximation}"] = {"bytes_per_row": bytes_per_row(cached_rows), **compared(loss, exact)}
    mean, noises = torch.zeros_like(exact), []
    for draw in range(row_draws):
        rows, weigh = drawn_rows(weights, batch.pictures, [draw * 1000 + i for i in range(len(batch.ids))], count)
        drawn_gradient = gradient(
            row_divergence(teacher_hidden[rows], teacher.head, hidden[rows], student.head, shared=shared, weights=weigh)
        )
        noises.append(float((drawn_gradient - exact).norm() / exact.norm()))
        mean += drawn_gradient / row_draws
    arms[f"iva.rows: {count}, {len(batch.ids)} samples, {row_draws} draws"] = {
        "noise": sum(noises) / len(noises),
        "noise_of_mean": float((mean - exact).norm() / exact.norm()),
    }
    about = f"{len(batch.ids)} samples, V = {shared:,}; exact gradients of L_kd (text) and L_iva (visual) and those of a cache"
    return {**measure.result("signals", name, about, torch.device("cpu")), "ratios": {}, "arms": arms}


def top_k_alone(logits: Tensor) -> TopK:
    """Top-k tokens renormalised, without the residual mass."""
    top = logits.topk(CUTS[-1])
    return TopK(top.indices, top.values.log_softmax(-1), top.values.new_full((len(logits),), -torch.inf))


def bytes_per_row(cached_rows: Rows) -> float:
    """Bytes per row in a cache with four-byte token ids."""
    if isinstance(cached_rows, TopK):
        return cached_rows.tokens.shape[1] * (4 + 2) + 2
    assert isinstance(cached_rows, Sampled)
    return float((cached_rows.counts > 0).sum(1).float().mean()) * (4 + 1) + 4 + 2


def main() -> None:
    parser = table.arguments("signals", __doc__)
    parser.add_argument("--size", choices=["digits", "small"], required=True)
    parser.add_argument("--student", type=Path, default=Path("artifacts/models/students/student"), help="digits: its folder")
    parser.add_argument("--draws", type=int, default=200, help="of visual rows, whose mean is compared with the exact gradient")
    args = parser.parse_args()
    measure.prepare()
    pair = digits(args.student) if args.size == "digits" else small()
    name = f"digits, {args.student}" if args.size == "digits" else args.size
    print(table.report(run(name, pair, args.draws), args.json))


if __name__ == "__main__":
    main()
