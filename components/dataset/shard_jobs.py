"""Shard jobs, distributed over processes: each result is complete on disk, or absent and made again.

A part depends on its number alone, so neither the number of workers nor an interruption changes a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from components.dataset.shard_writer import SplitWriter
from components.dataset.source import Provenance, Refused, Source, Stored
from components.io import write_bytes, write_text
from components.process import shared_out
from components.records.dataset import SplitRecord
from components.records.paths import SPLITS, Split
from components.records.record import Record, jsonl

HASHED = np.dtype([("split", "u1"), ("row", "u4"), ("dhash", "u8")])  # split and row of an image in the part

WORTH_A_WORKER = 200  # images: about the cost of starting a process


class Part(Record):
    """parts/NUMBER.json, written last: the part is complete if the file exists."""

    images: int  # read, including refused ones
    splits: dict[Split, SplitRecord]
    rows: int  # stored rows of the source, including those that `overlap.drop` removes later


class PartFiles(NamedTuple):
    record: Path
    provenance: Path
    quarantine: Path
    hashes: Path

    @classmethod
    def of(cls, folder: Path, part: int) -> PartFiles:
        """Files of one part of the unfinished data set in `folder`, beside its shards."""
        endings = ("json", "provenance.jsonl", "quarantine.jsonl", "hashes")
        return cls(*(folder / "parts" / f"{part:05d}.{ending}" for ending in endings))


def make(source: Source, folder: Path, images_per_shard: int, workers: int, bar: Callable[[int], object]) -> None:
    """Make all missing parts; `bar` receives the number of further images read.

    Raises TryAgainError if a worker was killed, and whatever a part raises; complete parts are kept.
    """
    todo = []
    for part in range(source.parts):
        record = PartFiles.of(folder, part).record
        if record.exists():
            bar(Part.read(record).images)
        else:
            todo.append(part)
    workers = min(workers, len(todo), len(todo) * images_per_shard // WORTH_A_WORKER)
    if workers <= 1:
        for part in todo:
            write_part(source, part, folder, images_per_shard, bar)
        return
    for made in shared_out(write_part, [(source, part, folder, images_per_shard) for part in todo], workers):
        bar(made.images)


def write_part(
    source: Source, part: int, folder: Path, images_per_shard: int, bar: Callable[[int], object] | None = None
) -> Part:
    """Write one part: shards, provenance, quarantine, image hashes and, last, its record."""
    origins: list[Provenance] = []
    refused: list[Refused] = []
    hashes: list[tuple[int, int, int]] = []
    images = rows = 0
    with ExitStack() as shards:
        options = (images_per_shard, source.boxes, source.several, part)
        writers = {split: shards.enter_context(SplitWriter(folder / split, *options)) for split in SPLITS}
        for stored in source.rows(part):
            images += 1
            if isinstance(stored, Stored):
                hashes += [(SPLITS.index(stored.origin.split), len(origins), dhash) for dhash in stored.hashes]
                writers[stored.origin.split].add(stored.row)
                origins.append(stored.origin)
                rows += stored.rows
            else:
                refused += stored
            if bar is not None:
                bar(1)
    record = Part(images=images, splits={split: writer.record for split, writer in writers.items()}, rows=rows)
    files = PartFiles.of(folder, part)
    write_text(files.provenance, jsonl(origins))
    write_text(files.quarantine, jsonl(refused))
    write_bytes(files.hashes, np.array(hashes, dtype=HASHED).tobytes())
    record.write(files.record)
    return record
