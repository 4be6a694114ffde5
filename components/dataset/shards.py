"""Prepared data set on disk: memory-mapped Arrow shards, one row per image with all its samples.

A shard is an Arrow IPC stream (`datasets.Dataset.from_file` opens it too), so a reader loads only the rows that it needs,
never a whole split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.errors import DataError
from components.io import sha256
from components.process import cores
from components.records.dataset import Manifest, ShardRecord, SourceRecord, Sources
from components.records.paths import Split
from components.records.rows import TriedRows

if TYPE_CHECKING:  # pyarrow is imported only where a shard is read or written
    import pyarrow as pa

IMAGE = "<image>"  # image mark in a question
CAPTION = "caption"  # kind that models learn first: train split only, never scored
ANEW = "`dvc checkout --force` brings it back, or `dvc repro prepare` makes it anew"


def schema(boxes: bool, several: bool = False) -> pa.Schema:
    """Arrow schema: one row per image, with all samples about it. The field `boxes` and the column `more` (further images)
    exist only if some question has boxes or some sample has several images."""
    import pyarrow as pa

    fields = [("from", pa.string()), ("value", pa.string())]
    turn = pa.struct([*fields, ("boxes", pa.list_(pa.list_(pa.float64())))] if boxes else fields)
    sample = pa.struct([("id", pa.string()), ("kind", pa.string()), ("conversations", pa.list_(turn))])
    columns = [("image_id", pa.string()), ("image", pa.binary()), ("samples", pa.list_(sample))]
    return pa.schema([*columns, ("more", pa.list_(pa.binary()))] if several else columns)


Box = tuple[float, float, float, float]  # left, top, right, bottom in shares of the image's width and height


@dataclass(frozen=True)
class Turn:
    """Question and reference answer; `<image>` in the question marks the position of an image."""

    question: str
    answer: str
    boxes: tuple[Box, ...] = ()  # region that the question is about; empty: unknown, or the whole image


@dataclass(frozen=True)
class Sample:
    id: str
    image_id: str
    kind: str
    image: bytes | None  # encoded file of the first image; None for text-only samples
    turns: tuple[Turn, ...]
    more: tuple[bytes, ...] = ()  # further images, in the order of their marks

    @property
    def images(self) -> tuple[bytes, ...]:
        return () if self.image is None else (self.image, *self.more)

    def upto(self, turns: int) -> Sample:
        """Sample cut to its first turns, and to their images."""
        kept = self.turns[:turns]
        shown = self.images[: sum(turn.question.count(IMAGE) for turn in kept)]
        return replace(self, turns=kept, image=shown[0] if shown else None, more=shown[1:])


@dataclass(frozen=True)
class ImageRow:
    """One image, or several shown together, and the samples about it, all in one split."""

    image_id: str
    image: bytes | None
    samples: tuple[tuple[str, str, tuple[Turn, ...]], ...]  # (id, kind, turns)
    more: tuple[bytes, ...] = ()

    def about(self) -> list[Sample]:
        return [Sample(id_, self.image_id, kind, self.image, turns, self.more) for id_, kind, turns in self.samples]

    def as_dict(self) -> dict[str, object]:
        return {
            "image_id": self.image_id,
            "image": self.image,
            "more": list(self.more),
            "samples": [
                {"id": id_, "kind": kind, "conversations": list(_conversation(turns))} for id_, kind, turns in self.samples
            ],
        }


def _conversation(turns: Iterable[Turn]) -> Iterator[dict[str, object]]:
    for turn in turns:
        yield {"from": "human", "value": turn.question, "boxes": turn.boxes or None}
        yield {"from": "gpt", "value": turn.answer}


class Samples(Sequence[Sample]):
    """Samples of one split, in stored order, by index. Opening checks each shard's count and, if `check`, its hash against the
    manifest; images are read from disk on access.

    Raises DataError if the split is missing or a shard differs from the manifest.
    """

    def __init__(self, dataset: Path, split: Split, tried: Path | None = None, check: bool = True) -> None:
        """`tried`: output folder of the stage `check_rows`, whose left-out samples are skipped and whose cuts are applied."""
        import pyarrow as pa
        import pyarrow.compute as pc

        self.manifest = Manifest.read(dataset / "manifest.json")
        if split not in self.manifest.splits:
            raise DataError(f"{dataset} has no split {split!r}; it has {', '.join(self.manifest.splits)}")
        self.record = self.manifest.splits[split]
        self._dataset, self._split, self._tried = dataset, split, tried
        tables = [open_shard(dataset / split / shard.file) for shard in self.record.shards]
        for shard, table in zip(self.record.shards, tables, strict=True):
            if table.num_rows != shard.images:
                raise DataError(f"{dataset / split / shard.file} holds {table.num_rows:,} images, not {shard.images:,}; {ANEW}")
        if check:
            check_hashes(dataset / split, self.record.shards)
        self._table = pa.concat_tables(tables or [schema(boxes=False).empty_table()])
        self._samples = pc.list_flatten(self._table.column("samples"))
        counts = pc.list_value_length(self._table.column("samples")).to_numpy()
        if (len(counts), int(counts.sum())) != (self.record.images, self.record.samples):
            raise DataError(f"{dataset / split}: shards do not hold what the manifest says; {ANEW}")
        self._verdicts = None if tried is None else self._read_verdicts(tried, check)
        usable = np.ones(int(counts.sum()), dtype=bool) if self._verdicts is None else self._verdicts["turns"] > 0
        rows = np.repeat(np.arange(len(counts)), counts)
        self._stored = np.flatnonzero(usable)  # sample index -> index among all stored samples
        self.row_of = rows[usable]  # sample index -> image row
        self._first = np.searchsorted(self.row_of, np.arange(len(counts) + 1))
        self._first_stored = np.cumsum(counts) - counts

    def __len__(self) -> int:
        return len(self.row_of)

    def __reduce__(self) -> tuple[type[Samples], tuple[Path, Split, Path | None, bool]]:
        """Pickle by path: a loader's worker opens the files itself, without checking hashes again."""
        return Samples, (self._dataset, self._split, self._tried, False)

    def _read_verdicts(self, tried: Path, check: bool) -> np.ndarray:
        tried_rows = TriedRows.read(tried / "rows.json")
        if tried_rows.digest != self.manifest.digest:
            raise DataError(f"{tried} is of another data set than {self._dataset}; `dvc repro check_rows` makes it anew")
        path = tried / f"{self._split}.npy"
        try:
            if check and sha256([path]) != tried_rows.sha256.get(self._split):
                raise DataError(f"{path} has changed since it was written; `dvc repro check_rows` makes it anew")
            verdict = np.load(path, mmap_mode="r")
        except OSError as error:
            raise DataError(f"{path}: {error}; `dvc repro check_rows` makes it anew") from None
        return verdict

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        """Sample with its images. Raises IndexError past either end."""
        index = range(len(self))[index]
        row = int(self.row_of[index])
        stored = int(self._stored[index])
        return _sample(self._samples[stored].as_py(), *_images(self._table, row), self._turns_kept(stored))

    def tokens(self, index: int) -> int:
        """Tokens of a sample as the model with the longest reading has it; only with `tried`."""
        assert self._verdicts is not None
        return int(self._verdicts["tokens"][self._stored[index]])

    def texts(self, row: int) -> list[Sample]:
        """All stored samples about image `row`, with empty bytes for images: no image is read."""
        images = (b"",) * len(_stored_images(self._table, row))
        name = self._table.column("image_id")[row].as_py()
        return [_sample(stored, name, images) for stored in self._table.column("samples")[row].as_py()]

    def image_sizes(self, row: int) -> tuple[tuple[int, int], ...]:
        """Width and height of each image of a row, from the file headers alone."""
        return image_sizes(image.as_buffer() for image in _stored_images(self._table, row))

    def about(self, row: int) -> list[Sample]:
        """The samples about image `row`, in one read: four times as fast as one by one."""
        images, stored = _images(self._table, row), self._table.column("samples")[row].as_py()
        chosen = self._stored[self._first[row] : self._first[row + 1]]
        return [_sample(stored[i - self._first_stored[row]], *images, self._turns_kept(i)) for i in chosen]

    def _turns_kept(self, stored: int) -> int | None:
        return None if self._verdicts is None else int(self._verdicts["turns"][stored])

    @property
    def kinds(self) -> list[str]:
        """Kind of each sample; no image is read."""
        import pyarrow.compute as pc

        kinds: list[str] = pc.struct_field(self._samples, "kind").take(self._stored).to_pylist()
        return kinds

    @property
    def sources(self) -> dict[str, SourceRecord] | None:
        """Source records of a mixture by name; None for other data sets."""
        return Sources.read(self._dataset / "sources.json").sources if self.manifest.source == "mixture" else None

    @property
    def weights(self) -> list[float] | None:
        """Source weight of each sample; None if the data set is no mixture."""
        import pyarrow.compute as pc

        if (sources := self.sources) is None:
            return None
        names = pc.list_element(pc.split_pattern(self._table.column("image_id"), "/", max_splits=1), 0).to_pylist()
        of_image = np.array([sources[name].weight for name in names])
        weights: list[float] = of_image[self.row_of].tolist()
        return weights

    def of_image(self, row: int) -> range:
        """Indices of the samples about image `row`."""
        return range(int(self._first[row]), int(self._first[row + 1]))

    @property
    def images(self) -> int:
        return self.record.images

    def equal_images(self) -> list[list[int]]:
        """Groups of image rows that store the same bytes."""
        rows: dict[bytes, list[int]] = {}
        for row in range(self.images):
            if stored := _stored_images(self._table, row):
                digests = [hashlib.sha256(image.as_buffer()).digest() for image in stored]
                rows.setdefault(b"".join(digests), []).append(row)
        return list(rows.values())

    def images_of(self, image_ids: Iterable[str]) -> dict[str, tuple[bytes, ...]]:
        """Encoded images by image id; ids that the split lacks are left out."""
        import pyarrow as pa
        import pyarrow.compute as pc

        selected = pc.is_in(self._table.column("image_id"), value_set=pa.array(list(image_ids), pa.string()))
        table = self._table.drop_columns("samples").filter(selected)
        return dict(_images(table, row) for row in range(table.num_rows))


def image_sizes(images: Iterable[bytes | pa.Buffer]) -> tuple[tuple[int, int], ...]:
    """Width and height of encoded images, from the file headers alone."""
    import pyarrow as pa
    from PIL import Image

    return tuple(Image.open(pa.BufferReader(image)).size for image in images)


def _images(table: pa.Table, row: int) -> tuple[str, tuple[bytes, ...]]:
    return table.column("image_id")[row].as_py(), tuple(image.as_py() for image in _stored_images(table, row))


def _stored_images(table: pa.Table, row: int) -> list[pa.BinaryScalar]:
    image = table.column("image")[row]
    more = list(table.column("more")[row]) if "more" in table.column_names else []
    return [image, *more] if image.is_valid else []


def _sample(stored: dict[str, Any], image_id: str, images: tuple[bytes, ...], turns_kept: int | None = None) -> Sample:
    turns = stored["conversations"]
    turns = tuple(
        Turn(q["value"], a["value"], tuple(map(tuple, q.get("boxes") or ())))
        for q, a in zip(turns[::2], turns[1::2], strict=True)
    )
    sample = Sample(stored["id"], image_id, stored["kind"], images[0] if images else None, turns, images[1:])
    return sample if turns_kept in (None, len(turns)) else sample.upto(turns_kept)


def check_hashes(folder: Path, shards: Sequence[ShardRecord]) -> None:
    """Raises DataError naming the first shard whose sha256 is not the record's. As fast as the disk."""
    from tqdm import tqdm

    with ThreadPoolExecutor(cores()) as pool:
        hashes = pool.map(lambda shard: sha256([folder / shard.file]), shards)  # hashing and reading release the GIL
        bar = tqdm(hashes, desc=f"check {folder.name}", total=len(shards), unit="shard")
        for shard, digest in zip(shards, bar, strict=True):
            if digest != shard.sha256:
                raise DataError(
                    f"{folder / shard.file} has changed since it was written: its sha256 is not the manifest's; {ANEW}"
                )


def open_shard(path: Path) -> pa.Table:
    import pyarrow as pa

    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        names = table.schema.names
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # UnicodeDecodeError: a damaged name
        raise DataError(f"{path}: {error}; {ANEW}") from None
    if table.schema not in [schema(boxes, several) for boxes in (False, True) for several in (False, True)]:
        raise DataError(f"{path}: its columns are {', '.join(names)}; {ANEW}")
    return table
