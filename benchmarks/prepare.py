"""Rate and memory of the stage `prepare`: `python -m benchmarks.prepare`, and with `--rows 10000 100000 1000000`

The sets are generated, in the LLaVA format: JPEG images with smooth structure and grain, each several times under other names,
two questions each. `prepare` reads, checks, decodes, hashes, looks for near duplicates, splits, writes shards, provenance, card
and contact sheet.

Rate: against Pillow alone decoding the same images of 640 x 480, both in one process: with more, `prepare` makes parts that
share nothing, as so many Pillows would. Memory, as data grow: images of 32 x 32, all cores; without pages of files.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks import measure, table
from components.config.data import DataSettings, LlavaFolder
from components.config.load import load_settings
from components.dataset.prepare import prepare
from components.process import cores

IMAGES, COPIES, WIDTH, HEIGHT, REPEATS = 400, 8, 640, 480, 3
QUESTIONS = ("What is in the picture?", "What is at the top left?")
SMALL, MAX_PICTURES = 32, 50_000  # memory runs: pixels a side, maximum of pictures
SAMPLE_INTERVAL = 0.5  # sampling interval of memory in seconds


def generate(folder: Path, images: int, copies: int, width: int = WIDTH, height: int = HEIGHT) -> DataSettings:
    """Write a LLaVA-format set under `folder`; returns its settings."""
    (folder / "images").mkdir(parents=True)
    with (folder / "rows.jsonl").open("w") as rows:
        for i in range(images):
            random = np.random.default_rng(i)
            coarse = Image.fromarray(random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
            grain = random.integers(-8, 9, smooth.shape, dtype=np.int16)
            first = folder / "images" / f"{i}-0.jpg"
            Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(first, quality=85)
            for copy in range(copies):
                name = f"{i}-{copy}.jpg"
                if copy:
                    first.with_name(name).hardlink_to(first)
                for question in QUESTIONS:
                    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "Clouds of colour."}]
                    rows.write(json.dumps({"id": f"{name} {question}", "image": name, "conversations": turns}) + "\n")
    llava = LlavaFolder(annotations=folder / "rows.jsonl", images=folder / "images", val=0.1, test=0.1)
    return load_settings().data.model_copy(update={"source": "llava", "llava": llava})


def decode(folder: Path) -> None:
    """Pillow alone: open, decode, convert to RGB."""
    for path in sorted((folder / "images").iterdir()):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.convert("RGB").load()


def rate(images: int = IMAGES, copies: int = COPIES, repeats: int = REPEATS) -> dict[str, Any]:
    device = measure.prepare()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = generate(folder / "raw", images, copies)
        target = folder / "dataset"

        def stage() -> None:
            shutil.rmtree(target, ignore_errors=True)
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                manifest = prepare(settings, target=target, workers=1)
            assert manifest.rows_out == len(QUESTIONS) * images * copies

        arms = {"pillow": lambda: decode(folder / "raw"), "prepare": stage}
        for work in arms.values():
            work()
        pairs = {"prepare_rate_vs_pillow": ("pillow", "prepare")}
        timing = measure.compare_arms(arms, repeats, device, "prepare", pairs, images=images * copies)
        kb = sum(path.stat().st_size for path in (folder / "raw" / "images").iterdir()) / copies / images / 1000
    about = f"{images * copies:,} JPEG images of {WIDTH} x {HEIGHT} ({kb:.0f} kB), two questions each"
    return measure.result("prepare", "llava", about, device) | timing


def memory(sizes: list[int]) -> dict[str, Any]:
    """Time and peak memory of `prepare`. `sizes`: rows of each set."""
    arms: dict[str, dict[str, float]] = {}
    for rows in sizes:
        images = rows // len(QUESTIONS)
        copies = -(-images // MAX_PICTURES)
        with tempfile.TemporaryDirectory() as name:
            settings = generate(Path(name) / "raw", images // copies, copies, SMALL, SMALL)
            options = {"target": Path(name) / "dataset", "workers": cores()}
            process = multiprocessing.get_context("spawn").Process(target=prepare, args=(settings,), kwargs=options)
            arm = process_cost(process)
        arms[f"{rows:,} rows"] = arm | {"images_per_second": images / arm["seconds"]}
    peaks = [arm["peak_mib"] for arm in arms.values()]
    about = f"JPEG images of {SMALL} x {SMALL}, two questions each; {cores()} processes"
    head = measure.result("prepare", f"to {sizes[-1]:,} rows", about, measure.prepare()) | {"clock": "wall time"}
    return head | {"arms": arms, "ratios": {"memory_of_prepare": peaks[-1] / peaks[0]}}


def process_cost(process: multiprocessing.process.BaseProcess) -> dict[str, float]:
    """Wall-clock seconds of the process, CPU seconds and peak memory (MiB) of it and its children, without file-backed
    pages."""
    memory_mib = [0.0]

    def sample_memory() -> None:
        process.start()
        while process.is_alive():
            with contextlib.suppress(psutil.Error):  # one of them ended meanwhile
                parent = psutil.Process(process.pid)
                infos = [member.memory_info() for member in (parent, *parent.children(recursive=True))]
                memory_mib.append(sum(info.rss - info.shared for info in infos) / measure.MIB)
            time.sleep(SAMPLE_INTERVAL)

    cost = measure.children_cost(sample_memory)
    if process.exitcode:
        raise SystemExit(f"it ended with exit code {process.exitcode}")
    return cost | {"peak_mib": max(memory_mib)}


def main() -> None:
    parser = table.arguments("prepare", __doc__)
    parser.add_argument("--rows", type=int, nargs="+", metavar="N", help="measure memory instead, on sets of so many rows")
    args = parser.parse_args()
    print(table.report(memory(args.rows) if args.rows else rate(), args.json))


if __name__ == "__main__":
    main()
