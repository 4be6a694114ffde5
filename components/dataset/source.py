"""What a source of data hands to `prepare`: rows to store, each in its split, and the rows that it had to refuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from components.artifacts import Record, Split
from components.shards import ImageRow


class Refused(Record):
    """One line of quarantine.jsonl."""

    row: int  # counted from 1: the line of a JSONL file, the element of a JSON list
    id: str | None
    reason: str
    detail: str


class Provenance(Record):
    """One line of provenance.jsonl: what an image was made of."""

    image_id: str
    split: Split
    raw: tuple[int, ...] = ()  # `source: digits`: indices of the raw digits
    file: str | None = None  # `source: llava`: the image file
    sha256: str | None = None  # of its pixels, by which splits are told apart


@dataclass
class Source:
    title: str
    licence: str
    images: int  # at most: what the progress bar counts to
    rows_in: int
    rows: Iterator[tuple[ImageRow, Provenance]]
    refused: list[Refused] = field(default_factory=list)  # grows while `rows` is read
