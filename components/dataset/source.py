"""Interface of a data source for `prepare`: parts, each of rows to store in their splits and of refused rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from components.dataset.shards import ImageRow
from components.records.paths import Split
from components.records.record import Record


class Refused(Record):
    """One line of quarantine.jsonl."""

    row: int  # from 1: line of a JSONL file, element of a JSON list
    id: str | None
    reason: str
    detail: str
    source: str | None = None  # name of the source, in a mixture


def quarantined(path: Path) -> list[Refused]:
    """Lines of a quarantine file."""
    return [Refused.model_validate_json(line) for line in path.read_bytes().splitlines()]


class Provenance(Record):
    """One line of provenance.jsonl: origin of an image."""

    image_id: str
    split: Split
    raw: tuple[int, ...] = ()  # `source: digits`: indices of the raw digits
    file: str | None = None  # own data: the image file
    sha256: str | None = None  # hash of the first image's pixels, or of the text if there is none; its group decides the split


class Rule(NamedTuple):
    """Rule that changed rows of a source (docs/data.md), or an ignored key."""

    source: str
    name: str
    rows: int
    row: int  # number of an example
    did: str  # change to the example


class Stored(NamedTuple):
    row: ImageRow
    origin: Provenance
    hashes: tuple[int, ...]  # dHash of each image (perceptual_hash.py); empty: not compared
    rows: int  # source rows, fewer than samples where a row became several


@dataclass(frozen=True)
class Source(ABC):
    """Data source in independent parts: any process can make any part, in any order, with the same result.

    A part becomes at most one shard per split, unless it is the only part.
    """

    title: str
    licence: str
    images: int  # upper bound, for the progress bar
    rows_in: int
    parts: int
    boxes: bool  # whether any question has boxes
    several: bool  # whether any sample may have several images

    @abstractmethod
    def rows(self, part: int) -> Iterator[Stored | list[Refused]]: ...

    def refused(self) -> Iterator[Refused]:
        """Rows refused before the split into parts."""
        return iter(())

    def rules(self) -> list[Rule]:
        """Rules applied before the split into parts."""
        return []
