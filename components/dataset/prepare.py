"""Stage `prepare`: whatever the source, checked rows become shards, a manifest, a quarantine list and a data card.

Everything is written to a neighbour folder and put in place at the end: there is a whole data set or the one before.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from components.artifacts import DATASET, RAW, RUNS, SPLITS, Manifest, Split, SplitRecord, jsonl, write_text
from components.dataset import digits, llava
from components.dataset.card import write_card
from components.dataset.source import Provenance, Refused, Source
from components.errors import DataError
from components.settings import DataSettings
from components.shards import SplitWriter


def prepare(settings: DataSettings, raw: Path = RAW, target: Path = DATASET) -> Manifest:
    """Build `target` from `settings.source`. Raises DataError if too many rows are bad or a split stays empty."""
    source = digits.source(settings, raw) if settings.source == "digits" else llava.source(settings)
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
    try:
        manifest = write(source, settings, draft)
        write_card(draft, source, manifest)
        _swap(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def write(source: Source, settings: DataSettings, folder: Path) -> Manifest:
    """Read the source to its end into `folder`: shards, manifest, provenance and quarantine. Raises DataError as `prepare`."""
    writers = {split: SplitWriter(folder / split, settings.images_per_shard) for split in SPLITS}
    provenance: list[Provenance] = []
    for row, origin in tqdm(source.rows, desc="prepare", total=source.images, unit="image", mininterval=1):
        writers[origin.split].add(row)
        provenance.append(origin)
    splits = {split: writer.close() for split, writer in writers.items()}
    source.refused.sort(key=lambda refused: refused.row)
    _accept(source, splits, settings.limits.max_bad_ratio)
    hashes = "".join(shard.sha256 for split in SPLITS for shard in splits[split].shards)
    manifest = Manifest(
        source=settings.source,
        rows_in=source.rows_in,
        rows_out=sum(split.samples for split in splits.values()),
        quarantined=len(source.refused),
        splits=splits,
        digest=hashlib.sha256(hashes.encode()).hexdigest(),
    )
    write_text(folder / "provenance.jsonl", jsonl(provenance))
    write_text(folder / "quarantine.jsonl", jsonl(source.refused))
    manifest.write(folder / "manifest.json")
    return manifest


def _accept(source: Source, splits: dict[Split, SplitRecord], max_bad_ratio: float) -> None:
    bad = len(source.refused)
    if source.rows_in != bad + sum(split.samples for split in splits.values()):
        raise AssertionError(f"{source.title}: of {source.rows_in} rows some are neither stored nor quarantined")
    if bad > max_bad_ratio * source.rows_in:
        listing = RUNS / "prepare" / "quarantine.jsonl"
        write_text(listing, jsonl(source.refused))
        raise DataError(
            f"{bad:,} of {source.rows_in:,} rows are bad, more than limits.max_bad_ratio = {max_bad_ratio} of params/data.yaml"
            f" allows: {summary(source.refused)}; each row and its reason is in {listing}"
        )
    empty = [name for name, split in splits.items() if not split.samples]
    if empty:
        raise DataError(f"no image fell into {' and '.join(empty)}: give more images, or raise the shares in params/data.yaml")


def summary(refused: list[Refused]) -> str:
    """`3 missing, 1 truncated`, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(row.reason for row in refused).most_common())


def _swap(draft: Path, target: Path) -> None:
    """Put the draft in the target's place; between the two renames there is no data set, never a mixed one."""
    before = target.with_name(f".{target.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        target.replace(before)
    draft.replace(target)
    shutil.rmtree(before, ignore_errors=True)
