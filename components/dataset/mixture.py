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
            for indexed in index.part(part * size, (part + 1) * size):
                try:
                    yield self._stored(indexed, index)
                except Refusal as refusal:
                    yield [self._refused(indexed, row, id_, refusal) for row, id_ in indexed.first.items()]

    def refused(self) -> Iterator[Refused]:
        with Index(self.index) as index:
            yield from index.refused()

    def rules(self) -> list[Rule]:
        with Index(self.index) as index:
            return index.rules()

    def _stored(self, indexed: Indexed, index: Index) -> Stored:
        limits, pictures = self.settings.limits, []
        for number, place in enumerate(indexed.places, start=1):
            which = f", image {number}" if len(indexed.places) > 1 else ""
            raw = self.stores[indexed.source].image(place, limits.max_image_mib)
            pictures.append(check(raw, f"{indexed.source}: {indexed.file}{which}", limits))
        digest = pictures[0].sha256 if pictures else hashlib.sha256(repr(indexed.rows[0][-1]).encode()).hexdigest()
        split = assign(index.group(digest), self.settings.seed, _source_settings(self.settings))
        samples = tuple((id_, kind, turns) for _, id_, kind, turns in indexed.rows)
        contents = [picture.content for picture in pictures]
        row = ImageRow(indexed.name, contents[0] if contents else None, samples, tuple(contents[1:]))
        origin = Provenance(image_id=indexed.name, split=split, file=indexed.file, sha256=digest)
        return Stored(row, origin, tuple(picture.dhash for picture in pictures), len(indexed.first))

    def _refused(self, indexed: Indexed, row: int, id_: str, refusal: Refusal) -> Refused:
        source = indexed.source if self.settings.source == "mixture" else None
        own = id_.removeprefix(f"{source}/") if source else id_
        return Refused(row=row, id=own, reason=refusal.reason, detail=refusal.detail, source=source)


def source(settings: DataSettings, index: Path, workers: int = 1) -> Mixed:
    """Data source over the index file `index`, which is built if it does not exist. Raises DataError as `build` does."""
    sources = stores(settings)
    if not index.exists():
        build(index, sources, settings.limits, settings.source == "mixture", workers)
    with Index(index) as rows:
        by_source = rows.rows
        title, licence = _title_and_licence(_source_settings(settings), by_source)
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
    chosen = _source_settings(settings)
    if isinstance(chosen, LlavaFolder):
        return {"llava": store(str(chosen.annotations), chosen.images)}
    return {name: store(source.files, source.images) for name, source in chosen.sources.items()}


def _source_settings(settings: DataSettings) -> LlavaFolder | Mixture:
    chosen = settings.llava if settings.source == "llava" else settings.mixture
    assert chosen is not None  # validated by the settings
    return chosen


def assign(digest: str, seed: int, held_out: HeldOut) -> Split:
    """Split of an image: a hash of seed and digest, as a uniform draw in 0..1."""
    draw = int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()[:8]) / 2**64
    if draw < held_out.test:
        return "test"
    return "val" if draw < held_out.test + held_out.val else "train"


def _title_and_licence(chosen: LlavaFolder | Mixture, rows: dict[str, int]) -> tuple[str, str]:
    if isinstance(chosen, LlavaFolder):
        return f"{chosen.annotations.name} with the images of {chosen.images}", OWN
    lines = ["| source | rows | weight | licence | files |", "|---|---:|---:|---|---|"]
    for name, source in chosen.sources.items():
        lines.append(f"| {name} | {rows[name]:,} | {source.weight:g} | {source.licence} | `{source.files}` |")
    return "Mixture of " + ", ".join(chosen.sources), "\n".join(lines)
