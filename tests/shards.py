"""Data sets of rows that a test makes up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from components.dataset.shard_writer import SplitWriter
from components.dataset.shards import ImageRow
from components.records.dataset import SplitRecord


def write_split(folder: Path, rows: Sequence[ImageRow], images_per_shard: int) -> SplitRecord:
    """Write all `rows` of one split to shards."""
    boxes = any(turn.boxes for row in rows for _, _, turns in row.samples for turn in turns)
    with SplitWriter(folder, images_per_shard, boxes, several=any(row.more for row in rows)) as writer:
        for row in rows:
            writer.add(row)
    return writer.record
