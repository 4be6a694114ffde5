"""What a source of data hands to `prepare`: parts, each of rows to store in their splits and of rows that had to be refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from components.dataset.shards import ImageRow
from components.records.paths import Split
from components.records.record import Record


class Refused(Record):
    """One line of quarantine.jsonl."""

    row: int  # counted from 1: the line of a JSONL file, the element of a JSON list
    id: str | None
    reason: str
    detail: str
    source: str | None = None  # name in a mixture


class Provenance(Record):
    """One line of provenance.jsonl: what an image was made of."""

    image_id: str
    split: Split
    raw: tuple[int, ...] = ()  # `source: digits`: indices of the raw digits
    file: str | None = None  # `source: llava`: the image file
    sha256: str | None = None  # hash of its pixels, the first's if there are several, which decides the split


class Rule(NamedTuple):
    """A rule by which rows of a source were changed (docs/data.md), or a key of them that was ignored."""

    source: str
    name: str
    rows: int
    row: int  # an example
    did: str  # action taken


class Stored(NamedTuple):
    row: ImageRow
    origin: Provenance
    hashes: tuple[int, ...]  # of its images, components/dataset/perceptual_hash.py; none: not to be compared
    rows: int  # rows of the source: fewer than samples where one row made several


class Source(Protocol):
    """Parts do not depend on one another: any process can make any of them, in any order, with the same result.

    A part becomes at most one shard of each split, unless it is the only one.
    """

    @property
    def title(self) -> str: ...

    @property
    def licence(self) -> str: ...

    @property
    def images(self) -> int:
        """At most: what the progress bar counts to."""

    @property
    def rows_in(self) -> int: ...

    @property
    def parts(self) -> int: ...

    @property
    def boxes(self) -> bool:
        """Whether any question's region is known."""

    @property
    def several(self) -> bool:
        """Whether any sample may show several images."""

    def rows(self, part: int) -> Iterator[Stored | list[Refused]]: ...

    def refused(self) -> Iterator[Refused]:
        """What was refused before there were parts."""

    def rules(self) -> list[Rule]:
        """What was changed before there were parts."""
