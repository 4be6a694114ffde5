"""KD on samples of mixed length, in passes by length, of equal many samples, and by TRL: `python -m benchmarks.mixed`

The stream has the kinds of LLaVA-1.5's mix665k in its shares: text alone, one-word answers about an image, longer answers,
conversations. Lengths of text are assumed (KINDS), and scaled from its 576 visual tokens to this tower's. Every arm learns from
the same samples in one optimiser step, and its loss is compared with that of the first before anything is timed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, peer, table
from benchmarks.shapes import EOS, FIRST_WORD, IMAGE, SIZES, Sample, Size, collate, trl_inputs
from benchmarks.step import KD_ONLY, Bench
from components.align_ti.batch import Batch
from components.align_ti.step import AlignTI, total
from components.cost.shapes import Language, Tower
from components.distill.sampler import split_batch, split_batch_by_length
from components.evaluate.memory import peak_bytes

KINDS = (  # share of the mix; (min, max) tokens of prompt and answer in LLaVA-1.5; with an image
    (0.06, (40, 400), (200, 1400), False),  # ShareGPT
    (0.70, (15, 60), (2, 12), True),  # VQA v2, GQA, OCR-VQA, A-OKVQA, RefCOCO, VG
    (0.16, (20, 60), (80, 250), True),  # LLaVA-Instruct: details, reasoning
    (0.08, (20, 60), (250, 600), True),  # LLaVA-Instruct: conversations
)
VISUAL = 576  # visual tokens of an image in LLaVA-1.5
STEP, PASS, STEPS = 32, 8, 2  # samples per optimiser step, and per pass of `equal`; timed steps
MIXED = replace(
    SIZES["tiny"],
    name="mixed",
    about="a 128-wide student, a 256-wide teacher, 4 layers each, 144 visual tokens, V = 2,048",
    tower=Tower(hidden=64, layers=2, heads=4, mlp=128, image_px=96, patch_px=8),
    student=Language(hidden=128, layers=4, heads=4, kv_heads=2, mlp=512, vocabulary=2048),
    teacher=Language(hidden=256, layers=4, heads=8, kv_heads=4, mlp=1024, vocabulary=2048),
    batch=PASS,
)
RATIOS = {  # samples per second of the second arm over the first
    "mixed_vs_trl": ("trl", "by length"),
    "mixed_vs_equal": ("equal", "by length"),
    "mixed_equal_vs_trl": ("trl", "equal"),
}


def samples(size: Size, count: int, seed: int = 0) -> list[Sample]:
    """Random samples of KINDS in their shares."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        _, *length_ranges, has_image = rng.choices(KINDS, weights=[kind[0] for kind in KINDS])[0]
        prompt_length, answer_length = (
            max(2, round(rng.randint(*limits) * size.tower.tokens / VISUAL)) for limits in length_ranges
        )
        tokens = torch.randint(FIRST_WORD, size.student.vocabulary, (prompt_length + answer_length,), generator=generator)
        image = torch.full((size.tower.tokens if has_image else 0,), IMAGE)
        pixels = torch.randn(3, size.tower.image_px, size.tower.image_px, generator=generator) if has_image else None
        answer = torch.cat([tokens[prompt_length:-1], torch.tensor([EOS])])
        result.append(Sample(torch.cat([tokens[:1], image, tokens[1:prompt_length]]), answer, pixels))
    return result


def ours(bench: Bench, passes: list[list[Sample]]) -> Callable[[], float]:
    """Gradients of a step of KD alone; returns its loss."""
    module = AlignTI(bench.student, bench.teacher, bench.method(KD_ONLY))
    weights = module.method.weight_vector(bench.device)
    batches = [collate(group).to(bench.device) for group in passes]
    counts = torch.stack([module.count(batch, None) for batch in batches]).sum(0)

    def pass_loss(batch: Batch) -> Tensor:
        return total(module(batch, [0] * len(batch.input_ids)).sums, counts, weights)

    return lambda: sum(float(bench.backward(partial(pass_loss, batch))) for batch in batches)


def trl(bench: Bench, passes: list[list[Sample]], tokens: int) -> Callable[[], float]:
    """The same by TRL's trainer. Raises ImportError without TRL."""
    student = bench.student.model
    trainer = peer.trainer(bench)
    batches = [trl_inputs(group, tokens, bench.device) for group in passes]

    return lambda: sum(float(trainer.training_step(student, inputs, None)) for inputs in batches)


def run(size: Size, device: torch.device, steps: int = STEPS, repeats: int | None = None) -> dict[str, Any]:
    bench = Bench(size, device)
    mix = samples(size, steps * STEP)
    pairs = [[(i, i) for i in range(start, start + STEP)] for start in range(0, len(mix), STEP)]

    def samples_of(step: list[list[tuple[int, int]]]) -> list[list[Sample]]:
        return [[mix[i] for _, i in group] for group in step]

    equal = [samples_of(split_batch(step, PASS, 0, 1)) for step in pairs]
    budget = max(len(group) * max(map(len, group)) for step in equal for group in step)  # equal peak memory
    lengths = [[len(mix[i]) for _, i in step] for step in pairs]
    by_length = [
        samples_of(split_batch_by_length(step, step_lengths, budget, 0, 1))
        for step, step_lengths in zip(pairs, lengths, strict=True)
    ]
    passes = {"by length": by_length, "equal": equal}
    not_measured: dict[str, str] = {}
    gradients_by_arm = {name: [ours(bench, step) for step in arm_steps] for name, arm_steps in passes.items()}
    try:
        gradients_by_arm["trl"] = [
            trl(bench, s, sum(len(sample.answer) for group in s for sample in group)) for s in passes["equal"]
        ]
    except ImportError as error:
        not_measured["trl"] = str(error)
    losses_by_arm = {name: [gradients() for gradients in arm_steps] for name, arm_steps in gradients_by_arm.items()}
    bench.optimiser.zero_grad()
    for name, losses in losses_by_arm.items():
        for loss, expected in zip(losses, losses_by_arm["by length"], strict=True):
            assert abs(loss - expected) <= 1e-4 * abs(expected), f"{name}: loss {loss}, not {expected}: not the same work"

    def steps_of(arm_steps: list[Callable[[], float]]) -> None:
        for gradients in arm_steps:
            gradients()
            bench.update()

    arms = {name: partial(steps_of, arm_steps) for name, arm_steps in gradients_by_arm.items()}
    peaks = {name: peak_bytes(partial(steps_of, arm_steps[:1]), device) for name, arm_steps in gradients_by_arm.items()}
    timed = measure.compare_arms(arms, repeats or 3, device, "mixed", RATIOS, samples=len(mix))
    tokens = sum(len(sample) for sample in mix)
    for name, arm in timed["arms"].items():
        arm_steps = passes["equal" if name == "trl" else name]
        padded_tokens = sum(len(group) * max(map(len, group)) for step in arm_steps for group in step)
        if name == "trl":  # prompts and answers are padded separately
            padded_tokens = sum(
                len(p) * (max(len(s.prompt) for s in p) + max(len(s.answer) for s in p)) for step in arm_steps for p in step
            )
        arm |= {"peak_mib": peaks[name] / measure.MIB, "padding": 1 - tokens / padded_tokens}
    about = (
        f"{size.about}; {steps} steps of {STEP} samples, {PASS} a pass or {budget:,} tokens;"
        f" loss {losses_by_arm['by length'][0]:.4f}"
    )
    return {**measure.result("mixed", size.name, about, device), **timed, "not_measured": not_measured}


def main() -> None:
    args = table.arguments("mixed", __doc__).parse_args()
    print(table.report(run(MIXED, measure.prepare()), args.json))


if __name__ == "__main__":
    main()
