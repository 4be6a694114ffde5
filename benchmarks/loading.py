"""Does a step wait for its batch? `python -m benchmarks.loading --size small`

Steps of vanilla KD, the quickest there are with a teacher, on a prepared set of JPEG images of 640 x 480: on batches that are
in memory already, and on batches that are read from shards, decoded, resized and tokenised, by the training itself or ahead of
it by processes of their own (`loaders` in params/runtime.yaml). No image comes twice, so no cache is hit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import measure, table
from benchmarks import prepare as jpegs
from benchmarks.shapes import SIZES, Size
from benchmarks.step import KD, Bench
from components.config.load import load_settings
from components.dataset.prepare import prepare
from components.dataset.shards import Samples
from components.digits.tokenizer import build_processor
from components.distill.loader import Steps, batches
from components.distill.sampler import Sampler
from components.models.collate import Collator
from components.models.template import Template

WARMUP_STEPS = 3  # warm-up steps: start of a loader, and its two prefetched batches
MIN_PICTURES = 50  # minimum of pictures, so that some fall into each split
LOADERS = (0, 1, 2)
STEPS = {"small": 12, "paper": 60}


def loader_steps(size: Size, samples: Samples, count: int) -> Steps:
    """`count` steps of `size.batch` images each, in the sampler's order, each image once."""
    settings = load_settings().distill.model_copy(update={"batch_size": size.batch, "micro_batch_size": size.batch})
    template = Template(system="")
    texts = (f"{turn.question} {turn.answer}" for sample in samples.about(0) for turn in sample.turns)
    processor = build_processor(texts, template, size.tower.image_px, size.tower.patch_px)
    collator = Collator(processor, template, size.prompt + size.response + 100, train=True)
    first_samples = [samples.of_image(row)[0] for row in range(count * size.batch)]
    return Steps(samples, collator, Sampler(first_samples, size.batch, seed=0), settings, rank=0, ranks=1)


def time_steps(stream: Iterator[Any], bench: Bench, count: int) -> tuple[list[float], list[float]]:
    """Wall-clock seconds of each of `count` steps, and how many of them it waited for its batch from `stream`."""
    loss = bench.loss("kd", bench.method(KD))
    seconds, waited = [], []
    for step in tqdm(range(WARMUP_STEPS + count), unit="step"):
        start = time.perf_counter()
        ((batch, bench.keys),) = next(stream)
        received = time.perf_counter()
        bench.batch = batch.to(bench.device)
        bench.optimise(loss)
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        if step >= WARMUP_STEPS:
            seconds.append(time.perf_counter() - start)
            waited.append(received - start)
    return seconds, waited


def run(size: Size, count: int, device: torch.device) -> dict[str, Any]:
    bench = Bench(size, device)
    arms: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = (WARMUP_STEPS + count) * size.batch
        pictures = max(MIN_PICTURES, 2 * images // jpegs.COPIES)
        prepare(jpegs.generate(folder / "raw", pictures, jpegs.COPIES), target=folder / "dataset")
        samples = Samples(folder / "dataset", "train")
        for arm, loaders in {"in memory": None, **{f"{n} loaders": n for n in LOADERS}}.items():
            steps = loader_steps(size, samples, WARMUP_STEPS + count)  # new collator: it caches processed images
            stream = batches(steps, 0, WARMUP_STEPS + count, loaders or 0)
            start = time.perf_counter()
            if loaders is None:
                preloaded = list(stream)
                seconds_per_image = (time.perf_counter() - start) / images
                stream = iter(preloaded)
            seconds, waited = time_steps(stream, bench, count)
            arms[arm] = measure.summary(seconds) | {"share_waited": sum(waited) / sum(seconds)}
    arms["loading alone, one process"] = {"seconds": seconds_per_image * size.batch, "images_per_second": 1 / seconds_per_image}
    best = min((f"{n} loaders" for n in LOADERS), key=lambda arm: arms[arm]["seconds"])
    about = f"{size.about}; batch {size.batch}, JPEG of {jpegs.WIDTH} x {jpegs.HEIGHT}, {count} steps of vanilla KD"
    return {
        **measure.result("loading", size.name, about, device),
        "clock": "wall time",
        "arms": arms,
        "ratios": {
            "loading_vs_memory": arms[best]["seconds"] / arms["in memory"]["seconds"],
            "loading_waited": arms[best]["share_waited"],
        },
    }


def main() -> None:
    parser = table.arguments("loading", __doc__)
    parser.add_argument("--size", choices=list(STEPS), required=True)
    args = parser.parse_args()
    print(table.report(run(SIZES[args.size], STEPS[args.size], measure.prepare()), args.json))


if __name__ == "__main__":
    main()
