"""The rate of the stage `prepare` against Pillow alone decoding the same images: `python -m benchmarks.prepare`

The set is generated, in the LLaVA format: JPEG images of 640 x 480 with smooth structure and grain, each eight times under
other names (so that the fixed cost of a data card is what it is in a set of some size), two questions each. `prepare` reads,
checks, decodes, hashes, looks for near duplicates, splits, writes shards, provenance, card and contact sheet. Both run in one
process: with more, `prepare` makes parts that share nothing, as so many Pillows would.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import measure, table
from components.config.data import DataSettings, LlavaFolder
from components.config.load import load_settings
from components.dataset.prepare import prepare

IMAGES, COPIES, WIDTH, HEIGHT, REPEATS = 400, 8, 640, 480, 3


def generate(folder: Path, images: int) -> DataSettings:
    """A LLaVA-format set under `folder`, and the settings that read it."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(images):
        random = np.random.default_rng(i)
        coarse = Image.fromarray(random.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = random.integers(-8, 9, smooth.shape, dtype=np.int16)
        picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        picture.save(folder / "images" / f"{i}-0.jpg", quality=85)
        for copy in range(COPIES):
            name = f"{i}-{copy}.jpg"
            if copy:
                (folder / "images" / name).hardlink_to(folder / "images" / f"{i}-0.jpg")
            for question in ("What is in the picture?", "What is at the top left?"):
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "Clouds of colour."}]
                rows.append({"id": f"{name} {question}", "image": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    llava = LlavaFolder(annotations=folder / "rows.json", images=folder / "images", val=0.1, test=0.1)
    return load_settings().data.model_copy(update={"source": "llava", "llava": llava})


def decode(folder: Path) -> int:
    """Pillow alone: open, decode, convert to RGB. Returns how many."""
    count = 0
    for path in sorted((folder / "images").iterdir()):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.convert("RGB").load()
        count += 1
    return count


def run(images: int = IMAGES, repeats: int = REPEATS) -> dict[str, Any]:
    device = measure.prepare()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = generate(folder / "raw", images)
        target = folder / "dataset"

        def stage() -> None:
            shutil.rmtree(target, ignore_errors=True)
            with contextlib.redirect_stderr(io.StringIO()):  # its own bar
                manifest = prepare(settings, target=target, workers=1)
            assert manifest.rows_out == 2 * images * COPIES

        arms: dict[str, measure.Work] = {"pillow": lambda: decode(folder / "raw"), "prepare": stage}
        for work in arms.values():
            work()
        pairs = {"prepare_rate_vs_pillow": ("pillow", "prepare")}
        found = measure.raced(arms, repeats, device, "prepare", pairs, images=images * COPIES)
        size = sum(path.stat().st_size for path in (folder / "raw" / "images").iterdir()) / COPIES
    return {
        "benchmark": "prepare",
        "size": "llava",
        "about": f"{images * COPIES:,} JPEG images of {WIDTH} x {HEIGHT} ({size / images / 1000:.0f} kB), two questions each",
        **measure.where_and_when(device),
        **found,
    }


def main() -> None:
    args = table.arguments("prepare", __doc__).parse_args()
    print(table.report(run(), args.json))


if __name__ == "__main__":
    main()
