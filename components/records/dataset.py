"""Records of stage `prepare`."""

from __future__ import annotations

from components.records.paths import Split
from components.records.record import Record


class ShardRecord(Record):
    file: str
    images: int
    samples: int
    sha256: str


class SplitRecord(Record):
    images: int
    samples: int
    kinds: dict[str, int]  # samples per question kind
    shards: list[ShardRecord]


class Manifest(Record):
    """artifacts/dataset/manifest.json"""

    source: str
    rows_in: int
    rows_out: int
    quarantined: int
    splits: dict[Split, SplitRecord]
    digest: str  # sha256 over the shards' hashes: the data set's identity


class SourceRecord(Record):
    """One source of a mixture; ids of its samples and images begin with its name and a slash."""

    weight: float  # repeats of each sample per epoch, on average
    licence: str
    files: str
    rows: int


class Sources(Record):
    """artifacts/dataset/sources.json, where the data set is a mixture"""

    sources: dict[str, SourceRecord]


class Likeness(Record):
    """Near-duplicate pair: a training image and an evaluation image."""

    train: str
    other: str
    where: str  # val, test, or a folder of evaluation images
    bits: int  # Hamming distance of their perceptual hashes
    verbatim: int  # conversations in common, word for word


class Overlap(Record):
    """artifacts/dataset/overlap.json: training near-duplicates of evaluation images (components/dataset/perceptual_hash.py)."""

    compared: dict[str, int]  # images per split and folder
    near: int  # training images with a near-duplicate
    verbatim: int  # conversations in common, over all pairs
    dropped: bool
    pairs: list[Likeness]  # nearest pairs, at most 50
