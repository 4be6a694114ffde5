"""Own data, from one source (`source: llava`) or several (`source: mixture`).

Unusable rows are quarantined with their reason. All rows about one image are stored with it, and its split depends on the
pixels, so that equal images under other names never cross splits.

Rows are indexed on disk (index.py); images are in memory one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from components.config.data import DataSettings, HeldOut, LlavaFolder, Mixture
from components.dataset.images import check
from components.dataset.index import Index, Indexed, build
from components.dataset.readers import Store, store
from components.dataset.shards import ImageRow
from components.dataset.source import Provenance, Refused, Rule, Source, Stored
from components.errors import Refusal
from components.records.paths import Split

OWN = "These are your own data; their licence is known to you. Note it here before you pass the data set on."


@dataclass(frozen=True)
class Mixed(Source):
    """Data source with parts of `images_per_shard` images, in the order of their first rows."""

    settings: DataSettings
    index: Path
    stores: dict[str, Store]
    rows_by_source: dict[str, int]

    def rows(self, part: int) -> Iterator[Stored | list[Refused]]:
        size = self.settings.images_per_shard
        with Index(self.index) as index:
            for found in index.part(part * size, (part + 1) * size):
                try:
                    yield self._stored(found, index)
                except Refusal as refusal:
                    yield [self._refused(found, row, id_, refusal) for row, id_ in found.first.items()]

    def refused(self) -> Iterator[Refused]:
        with Index(self.index) as index:
            yield from index.refused()

    def rules(self) -> list[Rule]:
        with Index(self.index) as index:
            return index.rules()

    def _stored(self, found: Indexed, index: Index) -> Stored:
        limits, pictures = self.settings.limits, []
        for number, place in enumerate(found.places, start=1):
            which = f", image {number}" if len(found.places) > 1 else ""
            raw = self.stores[found.source].image(place, limits.max_image_mib)
            pictures.append(check(raw, f"{found.source}: {found.file}{which}", limits))
        digest = pictures[0].sha256 if pictures else hashlib.sha256(repr(found.rows[0][-1]).encode()).hexdigest()
        split = assign(index.group(digest), self.settings.seed, _asked(self.settings))
        samples = tuple((id_, kind, turns) for _, id_, kind, turns in found.rows)
        contents = [picture.content for picture in pictures]
        row = ImageRow(found.name, contents[0] if contents else None, samples, tuple(contents[1:]))
        origin = Provenance(image_id=found.name, split=split, file=found.file, sha256=digest)
        return Stored(row, origin, tuple(picture.dhash for picture in pictures), len(found.first))

    def _refused(self, found: Indexed, row: int, id_: str, refusal: Refusal) -> Refused:
        source = found.source if self.settings.source == "mixture" else None
        own = id_.removeprefix(f"{source}/") if source else id_
        return Refused(row=row, id=own, reason=refusal.reason, detail=refusal.detail, source=source)


def source(settings: DataSettings, index: Path, workers: int = 1) -> Mixed:
    """Data source over the index file `index`, which is built if it does not exist. Raises DataError as `build` does."""
    sources = stores(settings)
    if not index.exists():
        build(index, sources, settings.limits, settings.source == "mixture", workers)
    with Index(index) as rows:
        by_source = rows.rows
        title, licence = _title_and_licence(_asked(settings), by_source)
        return Mixed(
            title=title,
            licence=licence,
            images=rows.images,
            rows_in=sum(by_source.values()),
            parts=-(-rows.images // settings.images_per_shard),
            boxes=rows.boxes,
            several=rows.several,
            settings=settings,
            index=index,
            stores=sources,
            rows_by_source=by_source,
        )


def stores(settings: DataSettings) -> dict[str, Store]:
    """Stores by source name. Raises DataError if a source's files are missing."""
    asked = _asked(settings)
    if isinstance(asked, LlavaFolder):
        return {"llava": store(str(asked.annotations), asked.images)}
    return {name: store(one.files, one.images) for name, one in asked.sources.items()}


def _asked(settings: DataSettings) -> LlavaFolder | Mixture:
    asked = settings.llava if settings.source == "llava" else settings.mixture
    assert asked is not None  # validated by the settings
    return asked


def assign(digest: str, seed: int, asked: HeldOut) -> Split:
    """Split of an image: a hash of seed and digest, as a uniform draw in 0..1."""
    draw = int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()[:8]) / 2**64
    if draw < asked.test:
        return "test"
    return "val" if draw < asked.test + asked.val else "train"


def _title_and_licence(asked: LlavaFolder | Mixture, rows: dict[str, int]) -> tuple[str, str]:
    if isinstance(asked, LlavaFolder):
        return f"{asked.annotations.name} with the images of {asked.images}", OWN
    lines = ["| source | rows | weight | licence | files |", "|---|---:|---:|---|---|"]
    for name, one in asked.sources.items():
        lines.append(f"| {name} | {rows[name]:,} | {one.weight:g} | {one.licence} | `{one.files}` |")
    return "Mixture of " + ", ".join(asked.sources), "\n".join(lines)
