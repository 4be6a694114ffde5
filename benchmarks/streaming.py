"""Memory of the stage `prepare` as data grow: `python -m benchmarks.streaming --rows 10000 100000 1000000`

The sets are generated: LLaVA JSONL and tar files of small JPEG images (32 x 32, 100,000 different ones, then the same again
under other names), one question each, one image in a thousand cut in half. `prepare` runs in processes of its own; their
memory is what is theirs alone (USS, pages of shards that they have mapped included), added up, sampled all along.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

from benchmarks import measure, table
from components.config.data import DataSettings, LlavaFolder
from components.config.load import load_settings
from components.process import cores
from components.records.dataset import Manifest

DIFFERENT, PER_TAR, CUT = 100_000, 10_000, 1000
EVERY = 0.5  # seconds between samples
POINTS = 200  # of a curve that is kept


def generate(folder: Path, rows: int) -> None:
    (folder / "tars").mkdir(parents=True)
    pictures: list[bytes] = []
    with (folder / "rows.jsonl.tmp").open("w") as lines:
        for i in tqdm(range(rows), desc=f"generate {rows:,} rows", unit="row"):
            if i % PER_TAR == 0:
                tar = (folder / "tars" / f"{i // PER_TAR:05d}.tar").open("wb")
            if i < DIFFERENT:
                pictures.append(_picture(i))
            content = pictures[i % DIFFERENT]
            info = tarfile.TarInfo(f"{i // 1000:04d}/{i}.jpg")
            info.size = len(content)
            tar.write(info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
            if i % PER_TAR == PER_TAR - 1 or i == rows - 1:
                tar.write(bytes(10_240))
                tar.close()
            turns = [
                {"from": "human", "value": "<image>\nWhat is at the top left?"},
                {"from": "gpt", "value": f"A patch of colour number {i}."},
            ]
            lines.write(json.dumps({"id": str(i), "image": info.name, "conversations": turns}) + "\n")
    (folder / "rows.jsonl.tmp").replace(folder / "rows.jsonl")


def _picture(number: int) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((32, 32), Image.Resampling.BILINEAR).save(file, "JPEG", quality=85)
    content = file.getvalue()
    return content[: len(content) // 2] if number % CUT == 7 else content


def settings_of(folder: Path) -> DataSettings:
    llava = LlavaFolder(annotations=folder / "rows.jsonl", images=folder / "tars" / "*.tar", val=0.01, test=0.01)
    return load_settings().data.model_copy(update={"source": "llava", "llava": llava})


PREPARE = """
import sys
from pathlib import Path
from components.dataset.prepare import prepare
from components.config.data import DataSettings
settings = DataSettings.model_validate_json(sys.argv[1], strict=False)
prepare(settings, target=Path(sys.argv[2]), workers=int(sys.argv[3]))
"""


def followed(settings: DataSettings, target: Path, workers: int) -> tuple[Manifest, list[tuple[float, float]]]:
    """Run `prepare`; returns what it made and (seconds, MiB) all along."""
    command = [sys.executable, "-c", PREPARE, settings.model_dump_json(), str(target), str(workers)]
    started, curve = time.perf_counter(), list[tuple[float, float]]()
    process = subprocess.Popen(command)
    while process.poll() is None:
        curve.append((time.perf_counter() - started, _memory(process.pid) / measure.MIB))
        time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(f"prepare ended with exit code {process.returncode}")
    return Manifest.read(target / "manifest.json"), curve


def _memory(pid: int) -> int:
    total = 0
    try:
        parent = psutil.Process(pid)
        for one in [parent, *parent.children(recursive=True)]:
            total += one.memory_full_info().uss
    except psutil.Error:  # it ended meanwhile
        pass
    return total


def run(sizes: list[int], folder: Path, workers: int) -> Iterator[dict[str, Any]]:
    """The result so far after each size: the largest may take an hour."""
    device = measure.prepare()
    arms: dict[str, dict[str, float]] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for rows in sizes:
        if not (folder / str(rows) / "rows.jsonl").exists():
            shutil.rmtree(folder / str(rows), ignore_errors=True)
            generate(folder / str(rows), rows)
        target = folder / "prepared" / "dataset"
        manifest, curve = followed(settings_of(folder / str(rows)), target, workers)
        assert (manifest.rows_in, manifest.quarantined) == (rows, rows // CUT)
        shutil.rmtree(target.parent)
        seconds, peak = curve[-1][0], max(mib for _, mib in curve)
        arms[f"{rows:,} rows"] = {"seconds": seconds, "images_per_second": rows / seconds, "peak_mib": peak}
        curves[str(rows)] = curve[:: -(-len(curve) // POINTS)]
        yield {
            "benchmark": "streaming",
            "size": f"to {rows:,} rows",
            "about": f"JPEG images of 32 x 32 in tar files, a question each, one in {CUT:,} damaged; {workers} processes",
            **measure.where_and_when(device),
            "clock": "wall time",
            "ratios": {"memory_of_prepare": peak / arms[f"{sizes[0]:,} rows"]["peak_mib"]},
            "arms": arms,
            "curves": curves,
        }


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2))
    for rows, curve in curves.items():
        seconds, mib = zip(*curve, strict=True)
        axes.plot([100 * second / seconds[-1] for second in seconds], mib, label=f"{int(rows):,} rows")
    axes.set(xlabel="share of the run, %", ylabel="memory of all processes, MiB", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = table.arguments("streaming", __doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--folder", type=Path, help="keep the generated sets there, and use those that are")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the curves")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for result in run(args.rows, args.folder or Path(name), args.workers):
            print(table.report(result, args.json), flush=True)
            if args.picture:
                draw(result["curves"], args.picture)


if __name__ == "__main__":
    main()
