"""Stage `prepare`: validates the rows of any source; writes shards, a manifest, a quarantine list and a data card.

Parts are written to a draft folder beside the target and moved into place at the end, so the target is never a partial
data set. An interrupted run is resumed from the draft if settings, files and code are the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from components.config.data import DataSettings, Mixture
from components.dataset import mixture, overlap
from components.dataset.card import write_card
from components.dataset.shard_jobs import Part, PartFiles, make
from components.dataset.shard_writer import joined
from components.dataset.source import Refused, Source, quarantined
from components.digits import grids
from components.digits.raw import FILE
from components.errors import NO_ROOM, DataError, InputError, TryAgainError
from components.io import fingerprint, write_text
from components.process import cores
from components.records.dataset import Manifest, SourceRecord, Sources, SplitRecord
from components.records.paths import DATASET, RAW, RUNS, SPLITS, Split
from components.records.record import jsonl


def prepare(settings: DataSettings, raw: Path = RAW, target: Path = DATASET, workers: int | None = None) -> Manifest:
    """Build `target` from `settings.source` with `workers` processes, by default one per core.

    Raises:
        DataError: a source cannot be read, too many rows are bad, or a split is empty; the draft is removed.
        TryAgainError: the disk is full, a worker was killed, or the hub is unreachable; complete parts are kept.
    """
    draft = target.with_name(f".{target.name}.draft")
    try:
        _begin(draft, settings, raw)
        source = source_of(settings, draft / "index.sqlite", raw, workers or cores())
        manifest = write(source, settings, draft, workers or cores())
        write_card(draft, source, manifest)
        _finish(draft)
        _swap(draft, target)
    except InputError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise TryAgainError(
            f"{draft} cannot grow ({error.strerror or error}); free space and run again: what is whole there is gone on from"
        ) from None
    return manifest


def source_of(settings: DataSettings, index: Path, raw: Path = RAW, workers: int = 1) -> Source:
    """Data source of the settings; rows of own data are indexed in the file `index`. Raises DataError if it cannot be read."""
    return grids.source(settings, raw) if settings.source == "digits" else mixture.source(settings, index, workers)


def _begin(draft: Path, settings: DataSettings, raw: Path) -> None:
    """Start an empty draft, or resume one of the same settings, files and code, without its half-written files."""
    started = draft / "started"
    stores = {} if settings.source == "digits" else mixture.stores(settings)
    paths = [path for store in stores.values() for path in store.paths] or [raw / FILE]
    files = {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists()}
    same = fingerprint({"settings": settings.model_dump(mode="json"), "files": files}, ["dataset", "digits"])
    if not started.exists() or started.read_text(encoding="utf-8") != same:
        shutil.rmtree(draft, ignore_errors=True)
        write_text(started, same)
    for stray in draft.rglob(".*.tmp"):
        stray.unlink()


def write(source: Source, settings: DataSettings, folder: Path, workers: int = 1) -> Manifest:
    """Write shards, manifest, provenance and quarantine of a source to `folder`. Raises DataError as `prepare`."""
    parts = [PartFiles.of(folder, part) for part in range(source.parts)]
    early = list(source.refused())
    _accept(early, source.rows_in, settings.limits.max_bad_ratio)
    chosen = settings.mixture if settings.source == "mixture" else None
    benchmarks = overlap.of_benchmarks(chosen.evaluation_images if chosen else [], settings.limits)  # before hours of work
    with tqdm(desc="prepare", total=source.images, unit="image") as bar:
        make(source, folder, settings.images_per_shard, workers, bar.update)
    left_out = _compare(source, chosen, folder, parts, benchmarks) if isinstance(source, mixture.Mixed) else set()
    records = [Part.read(part.record) for part in parts]
    late = (row for part in parts for row in quarantined(part.quarantine))
    refused = sorted([*early, *late], key=lambda row: (row.source or "", row.row))
    splits = {split: joined(record.splits[split] for record in records) for split in SPLITS}
    bad = sum(row.reason != "near_duplicate" for row in refused)
    if source.rows_in != bad + sum(record.rows for record in records):
        raise AssertionError(f"{source.title}: of {source.rows_in} rows some are neither stored nor quarantined")
    _accept(refused, source.rows_in, settings.limits.max_bad_ratio)
    _check_splits(splits)
    hashes = "".join(shard.sha256 for split in SPLITS for shard in splits[split].shards)
    manifest = Manifest(
        source=settings.source,
        rows_in=source.rows_in,
        rows_out=sum(split.samples for split in splits.values()),
        quarantined=len(refused),
        splits=splits,
        digest=hashlib.sha256(hashes.encode()).hexdigest(),
    )
    _write_provenance(folder, parts, left_out)
    write_text(folder / "quarantine.jsonl", jsonl(refused))
    manifest.write(folder / "manifest.json")
    return manifest


def _compare(
    source: mixture.Mixed, chosen: Mixture | None, folder: Path, parts: list[PartFiles], benchmarks: overlap.Benchmarks
) -> set[str]:
    """Write overlap.json and, for a mixture, sources.json. Returns the near duplicates that were dropped."""
    overlaps, concerned = overlap.report(parts, source.index, benchmarks)
    dropped = chosen is not None and chosen.near_duplicates == "drop"
    if dropped:
        overlap.drop(folder, concerned, source.index)
    overlaps.model_copy(update={"dropped": dropped}).write(folder / "overlap.json")
    if chosen:
        sources = {
            name: SourceRecord(**of_mixture.model_dump(exclude={"images"}), rows=source.rows_by_source[name])
            for name, of_mixture in chosen.sources.items()
        }
        Sources(sources=sources).write(folder / "sources.json")
    return set().union(*concerned.values()) if dropped else set()


def _write_provenance(folder: Path, parts: list[PartFiles], left_out: set[str]) -> None:
    with (folder / "provenance.jsonl").open("wb") as file:
        for part in parts:
            lines = part.provenance.read_bytes().splitlines(keepends=True)
            file.writelines(line for line in lines if not left_out or json.loads(line)["image_id"] not in left_out)


def _accept(refused: list[Refused], rows_in: int, max_bad_ratio: float) -> None:
    """Raises DataError, and writes the list, if more rows than `max_bad_ratio` are bad. Near duplicates do not count."""
    bad = [row for row in refused if row.reason != "near_duplicate"]
    if len(bad) > max_bad_ratio * rows_in:
        listing = RUNS / "prepare" / "quarantine.jsonl"
        write_text(listing, jsonl(bad))
        raise DataError(
            f"{bad_rows(bad, rows_in)}, more than limits.max_bad_ratio = {max_bad_ratio} of params/data.yaml allows; each row"
            f" and its reason is in {listing}"
        )


def _check_splits(splits: dict[Split, SplitRecord]) -> None:
    empty = [name for name, split in splits.items() if not split.samples]
    if empty:
        raise DataError(f"no image fell into {' and '.join(empty)}: give more images, or raise the shares in params/data.yaml")


def summary(refused: list[Refused]) -> str:
    """Counts by reason, the most frequent first: `3 missing, 1 truncated`."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(row.reason for row in refused).most_common())


def bad_rows(refused: list[Refused], rows_in: int) -> str:
    """`2 of 40 rows are bad (...)`, with counts by reason and the first row as an example."""
    first = min(refused, key=lambda row: (row.source or "", row.row))
    of = f" of {first.source}" if first.source else ""
    return f"{len(refused):,} of {rows_in:,} rows are bad ({summary(refused)}, such as row {first.row}{of}: {first.detail})"


def _finish(draft: Path) -> None:
    """Remove the working files; the draft cannot be resumed afterwards."""
    (draft / "started").unlink()
    (draft / "index.sqlite").unlink(missing_ok=True)
    shutil.rmtree(draft / "parts")


def _swap(draft: Path, target: Path) -> None:
    """Replace the target by the draft; between the two renames there is no data set, but never a mixed one."""
    before = target.with_name(f".{target.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        target.replace(before)
    draft.replace(target)
    shutil.rmtree(before, ignore_errors=True)
