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
from benchmarks.shapes import EOS, FIRST_WORD, IMAGE, SIZES, Batch, Sample, Size, collated, handed
from benchmarks.step import KD_ONLY, Bench
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
    draw, stream = random.Random(seed), torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        _, *between, shows = draw.choices(KINDS, weights=[kind[0] for kind in KINDS])[0]
        asked, answered = (max(2, round(draw.randint(*limits) * size.tower.tokens / VISUAL)) for limits in between)
        words = torch.randint(FIRST_WORD, size.student.vocabulary, (asked + answered,), generator=stream)
        image = torch.full((size.tower.tokens if shows else 0,), IMAGE)
        pixels = torch.randn(3, size.tower.image_px, size.tower.image_px, generator=stream) if shows else None
        answer = torch.cat([words[asked:-1], torch.tensor([EOS])])
        made.append(Sample(torch.cat([words[:1], image, words[1:asked]]), answer, pixels))
    return made


def ours(bench: Bench, passes: list[list[Sample]]) -> Callable[[], float]:
    """Gradients of a step of KD alone; returns its loss."""
    module = AlignTI(bench.student, bench.teacher, bench.method(KD_ONLY))
    weights = module.method.weight_vector(bench.device)
    batches = [collated(some).to(bench.device) for some in passes]
    counts = torch.stack([module.count(batch, None) for batch in batches]).sum(0)

    def of_pass(batch: Batch) -> Tensor:
        return total(module(batch, [0] * len(batch.input_ids)).sums, counts, weights)

    return lambda: sum(float(bench.backward(partial(of_pass, batch))) for batch in batches)


def trl(bench: Bench, passes: list[list[Sample]], tokens: int) -> Callable[[], float]:
    """The same by TRL's trainer. Raises ImportError without TRL."""
    student = bench.student.model
    trainer = peer.trainer(bench)
    batches = [handed(some, tokens, bench.device) for some in passes]

    return lambda: sum(float(trainer.training_step(student, inputs, None)) for inputs in batches)


def run(size: Size, device: torch.device, steps: int = STEPS, repeats: int | None = None) -> dict[str, Any]:
    bench = Bench(size, device)
    stream = samples(size, steps * STEP)
    pairs = [[(i, i) for i in range(start, start + STEP)] for start in range(0, len(stream), STEP)]

    def read(step: list[list[tuple[int, int]]]) -> list[list[Sample]]:
        return [[stream[i] for _, i in some] for some in step]

    equal = [read(split_batch(step, PASS, 0, 1)) for step in pairs]
    budget = max(len(some) * max(map(len, some)) for step in equal for some in step)  # equal peak memory
    lengths = [[len(stream[i]) for _, i in step] for step in pairs]
    by_length = [read(split_batch_by_length(step, of, budget, 0, 1)) for step, of in zip(pairs, lengths, strict=True)]
    passes = {"by length": by_length, "equal": equal}
    missing: dict[str, str] = {}
    ways = {name: [ours(bench, step) for step in made] for name, made in passes.items()}
    try:
        ways["trl"] = [trl(bench, s, sum(len(one.answer) for some in s for one in some)) for s in passes["equal"]]
    except ImportError as error:
        missing["trl"] = str(error)
    found = {name: [gradients() for gradients in made] for name, made in ways.items()}
    bench.optimiser.zero_grad()
    for name, losses in found.items():
        for mine, first in zip(losses, found["by length"], strict=True):
            assert abs(mine - first) <= 1e-4 * abs(first), f"{name}: loss {mine}, not {first}: not the same work"

    def steps_of(made: list[Callable[[], float]]) -> None:
        for gradients in made:
            gradients()
            bench.update()

    arms = {name: partial(steps_of, made) for name, made in ways.items()}
    peaks = {name: peak_bytes(partial(steps_of, made[:1]), device) for name, made in ways.items()}
    timed = measure.raced(arms, repeats or 3, device, "mixed", RATIOS, samples=len(stream))
    used = sum(len(sample) for sample in stream)
    for name, arm in timed["arms"].items():
        made = passes["equal" if name == "trl" else name]
        held = sum(len(some) * max(map(len, some)) for step in made for some in step)
        if name == "trl":  # prompts and answers are padded separately
            held = sum(len(p) * (max(len(s.prompt) for s in p) + max(len(s.answer) for s in p)) for step in made for p in step)
        arm |= {"peak_mib": peaks[name] / measure.MIB, "padding": 1 - used / held}
    about = (
        f"{size.about}; {steps} steps of {STEP} samples, {PASS} a pass or {budget:,} tokens; loss {found['by length'][0]:.4f}"
    )
    return {**measure.result("mixed", size.name, about, device), **timed, "not_measured": missing}


def main() -> None:
    args = table.arguments("mixed", __doc__).parse_args()
    print(table.report(run(MIXED, measure.prepare()), args.json))


if __name__ == "__main__":
    main()
