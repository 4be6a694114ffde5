"""Near duplicates of evaluation images in the training split, by perceptual hash: a report, and optional removal.

Images of equal pixels are in one split from the start (mixture.py), so the report lists resized, recompressed and recoloured
copies across splits, and copies of any kind among benchmark images.
"""

from __future__ import annotations

import json
from glob import escape, glob
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from components.config.data import DataLimits
from components.dataset.images import load
from components.dataset.index import Index
from components.dataset.perceptual_hash import nearest
from components.dataset.shard_jobs import HASHED, Part, PartFiles
from components.dataset.shard_writer import without
from components.dataset.source import Refused, quarantined
from components.errors import DataError, Refusal
from components.io import write_text
from components.records.dataset import Likeness, Overlap
from components.records.paths import SPLITS
from components.records.record import jsonl

LISTED = 50  # pairs named in the report
Benchmarks = dict[str, list[tuple[int, str]]]  # dHash and name of each image, by folder
EVALUATED = [SPLITS.index("val"), SPLITS.index("test")]


def report(parts: list[PartFiles], index: Path, benchmarks: Benchmarks) -> tuple[Overlap, dict[int, set[str]]]:
    """Overlap report, and near-duplicate training images by part."""
    evaluated, evaluated_names, others = _evaluated(parts, benchmarks)
    with_train = near = verbatim = 0
    pairs: list[Likeness] = []
    concerned: dict[int, set[str]] = {}
    with Index(index) as rows:
        for number, part in enumerate(parts):
            hashes = np.fromfile(part.hashes, dtype=HASHED)
            train = hashes[hashes["split"] == SPLITS.index("train")]
            with_train += len(train)
            best, bits = nearest(train["dhash"], evaluated)
            hits = np.flatnonzero(best >= 0)
            names = _names(part) if hits.size else []
            for i in hits:
                image, (where, other) = names[train["row"][i]], evaluated_names[best[i]]
                same = len(rows.texts(image) & rows.texts(other))
                pairs.append(Likeness(train=image, other=other, where=where, bits=int(bits[i]), verbatim=same))
                concerned.setdefault(number, set()).add(image)
                near += 1
                verbatim += same
            pairs = sorted(pairs, key=lambda pair: pair.bits)[:LISTED]  # bounds memory: there may be a million
    compared = {"train": with_train, **others}
    return Overlap(compared=compared, near=near, verbatim=verbatim, dropped=False, pairs=pairs), concerned


def drop(folder: Path, concerned: dict[int, set[str]], index: Path) -> None:
    """Remove these training images from their shards and quarantine their rows. Idempotent."""
    with Index(index) as rows:
        for number, images in concerned.items():
            files = PartFiles.of(folder, number)
            record = Part.read(files.record)
            splits = {**record.splits, "train": without(folder / "train", record.splits["train"], images)}
            before = quarantined(files.quarantine)
            refused = [row for row in before if row.reason != "near_duplicate"]
            for image in sorted(images):
                for source, row, id_ in rows.rows_of(image):
                    detail = f"{image} looks like an image that is evaluated on (overlap.json)"
                    own = id_.removeprefix(f"{source}/")
                    refused.append(Refused(row=row, id=own, reason="near_duplicate", detail=detail, source=source))
            write_text(files.quarantine, jsonl(refused))
            record.model_copy(update={"splits": splits}).write(files.record)


def of_benchmarks(folders: list[Path], limits: DataLimits) -> Benchmarks:
    """Images of evaluation folders. Raises DataError for a folder without any, and for one that cannot be read."""
    benchmarks: Benchmarks = {}
    for folder in folders:
        paths = sorted(map(Path, glob(f"{escape(str(folder))}/**", recursive=True)))  # noqa: PTH207  (rglob follows no link)
        images = [path for path in paths if path.suffix.lower() in Image.registered_extensions() and path.is_file()]
        if not images:
            raise DataError(f"params/data.yaml: mixture.evaluation_images: {folder} holds no image")
        bar = tqdm(images, desc=f"prepare: images of {folder}", unit="image")
        benchmarks[str(folder)] = [(_dhash_of(path, limits), str(path.relative_to(folder))) for path in bar]
    return benchmarks


def _evaluated(parts: list[PartFiles], benchmarks: Benchmarks) -> tuple[np.ndarray, list[tuple[str, str]], dict[str, int]]:
    """Evaluation images: hashes (n,), names (split or folder, image), and number by split or folder."""
    dhashes: list[int] = []
    names: list[tuple[str, str]] = []
    compared = dict.fromkeys(("val", "test"), 0)
    for part in parts:
        hashes = np.fromfile(part.hashes, dtype=HASHED)
        held_out = hashes[np.isin(hashes["split"], EVALUATED)]
        if held_out.size:
            of_part = _names(part)
            for split, row, dhash in held_out.tolist():
                compared[SPLITS[split]] += 1
                names.append((SPLITS[split], of_part[row]))
                dhashes.append(dhash)
    for folder, images in benchmarks.items():
        compared[folder] = len(images)
        dhashes += [dhash for dhash, _ in images]
        names += [(folder, name) for _, name in images]
    return np.array(dhashes, dtype=np.uint64), names, compared


def _dhash_of(path: Path, limits: DataLimits) -> int:
    try:
        return load(path, limits).dhash
    except Refusal as refusal:
        raise DataError(f"params/data.yaml: mixture.evaluation_images: {refusal.detail}") from None


def _names(part: PartFiles) -> list[str]:
    return [json.loads(line)["image_id"] for line in part.provenance.read_bytes().splitlines()]
