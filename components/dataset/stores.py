"""Where rows and their images lie: LLaVA annotations with a folder or tar files, WebDataset shards, Parquet files.

A store reads the rows of one source in order, without their images, and says of each where its image is; any process can
then fetch that image by itself. Nothing is unpacked.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from components.dataset import json_rows
from components.dataset.images import Refusal, read, too_large
from components.errors import DataError, TryAgainError

HUB = "hf://datasets/"
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
Place = list[Any]  # JSON: what `Store.image` finds an image by


class Found(NamedTuple):
    number: int  # of the row within its source, from 1
    raw: Any  # a row as JSON, or the Refusal of what was there instead
    place: Place | None  # of its image; None: `Store.locate` knows it by the row's path


class Store(Protocol):
    def rows(self) -> Iterator[Found]:
        """Raises DataError if the files cannot be read or are cut off."""

    def members(self) -> Iterator[tuple[str, Place]]:
        """Name and place of every image that rows may name by a path; none where a path is a place itself."""

    def image(self, place: Place, max_mib: float) -> bytes:
        """Raises Refusal: missing_file or too_large."""

    @property
    def paths(self) -> list[Path]:
        """The files that decide what `rows` yields."""


def store(files: str, images: Path | None) -> Store:
    """LLaVA annotations if there are `images` to them, else what the ending says. Raises DataError if it is none of these."""
    if images is not None:
        path = Path(_downloaded(files) if files.startswith(HUB) else files)
        if images.is_dir():
            return Folder(path, images)
        if not str(images).endswith(".tar"):
            raise DataError(f"params/data.yaml: images: {images} is no folder, and no tar files either: x/*.tar")
        return Tars(path, found(str(images)))
    if files.endswith(".tar"):
        return WebDataset(found(files))
    if files.endswith(".parquet"):
        return Parquet(found(files))
    raise DataError(
        f"params/data.yaml: {files}: annotations (.json, .jsonl) need `images`, their folder or tar files; what brings its"
        " images itself ends in .tar (WebDataset) or .parquet"
    )


def found(pattern: str) -> list[Path]:
    """The files of that name or pattern, in order. Raises DataError if there is none, TryAgainError if the hub is not there."""
    local = Path(_downloaded(pattern) if pattern.startswith(HUB) else pattern)
    some = sorted(Path(local.anchor).glob(str(local.relative_to(local.anchor))))
    if not some:
        raise DataError(f"params/data.yaml: there is no file {pattern}")
    return some


def _downloaded(address: str) -> str:
    """hf://datasets/ORG/NAME@COMMIT/PATTERN, fetched, as a local pattern."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    where, _, rest = address.removeprefix(HUB).partition("@")
    commit, _, pattern = rest.partition("/")
    if where.count("/") != 1 or len(commit) != 40 or not pattern:
        raise DataError(f"params/data.yaml: {address} is not {HUB}ORG/NAME@COMMIT/FILES, with all 40 digits of the commit")
    try:
        folder = snapshot_download(where, repo_type="dataset", revision=commit, allow_patterns=[pattern])
    except LocalEntryNotFoundError:
        raise TryAgainError(f"{address}: the hub cannot be reached, and not all of it was downloaded before") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403, 404):
            raise DataError(
                f"{address}: the hub says {code}: no such data set, commit or file, or it is gated; accept its terms on its"
                " page, then `hf auth login`"
            ) from None
        raise TryAgainError(f"{address}: the hub says {code}") from None
    except OSError as error:
        if error.errno == 28:
            raise
        raise TryAgainError(f"{address}: the download stopped: {error}") from None
    return str(Path(folder) / pattern)


# --- LLaVA annotations ------------------------------------------------------------------------------------------------


class Folder:
    """Images are files of a folder; links that the user has put there are followed."""

    def __init__(self, path: Path, images: Path) -> None:
        self.path, self.folder = path, images

    @property
    def paths(self) -> list[Path]:
        return [self.path]

    def rows(self) -> Iterator[Found]:
        for number, raw in json_rows.rows(self.path):
            image = raw.get("image") if isinstance(raw, dict) else None
            yield Found(number, raw, [str(PurePosixPath(image))] if isinstance(image, str) else None)

    def members(self) -> Iterator[tuple[str, Place]]:
        return iter(())

    def image(self, place: Place, max_mib: float) -> bytes:
        return read(self.folder / place[0], max_mib)


class Tars:
    """Images are members of tar files, which rows call by their names there."""

    def __init__(self, path: Path, tars: list[Path]) -> None:
        self.path, self.tars = path, tars

    @property
    def paths(self) -> list[Path]:
        return [self.path, *self.tars]

    def rows(self) -> Iterator[Found]:
        return (Found(number, raw, None) for number, raw in json_rows.rows(self.path))

    def members(self) -> Iterator[tuple[str, Place]]:
        for index, tar in enumerate(self.tars):
            for member in members(tar):
                yield str(PurePosixPath(member.name)), [index, member.offset_data, member.size]

    def image(self, place: Place, max_mib: float) -> bytes:
        tar, offset, size = place
        return _cut(self.tars[tar], offset, size, max_mib)


# --- WebDataset -------------------------------------------------------------------------------------------------------


class WebDataset:
    """Members that share a name up to its first dot are one sample: KEY.json holds a LLaVA row, KEY.jpg (or another kind of
    picture) its image. The row's own `image` is not looked at; without `id` the key is the id."""

    def __init__(self, tars: list[Path]) -> None:
        self.tars = tars

    @property
    def paths(self) -> list[Path]:
        return self.tars

    def rows(self) -> Iterator[Found]:
        number = 0
        for index, tar in enumerate(self.tars):
            with tar.open("rb") as file:
                for key, parts in _samples(members(tar)):
                    number += 1
                    yield Found(number, *_sample(file, f"{tar.stem}/{key}", parts, index))

    def members(self) -> Iterator[tuple[str, Place]]:
        return iter(())

    def image(self, place: Place, max_mib: float) -> bytes:
        tar, offset, size = place
        return _cut(self.tars[tar], offset, size, max_mib)


def _samples(of_tar: Iterator[tarfile.TarInfo]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    key, parts = "", dict[str, tarfile.TarInfo]()
    for member in of_tar:
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        if (its := f"{folder}/{stem}".lstrip("./")) != key and parts:
            yield key, parts
            parts = {}
        key, parts[ending.lower()] = its, member
    if parts:
        yield key, parts


def _sample(file: Any, name: str, parts: dict[str, tarfile.TarInfo], tar: int) -> tuple[Any, Place | None]:
    if "json" not in parts:
        return Refusal("missing_key", f"{name} has {', '.join(sorted(parts))} and no json"), None
    pictures = [parts[ending] for ending in PICTURES if ending in parts]
    if len(pictures) > 1:
        return Refusal("wrong_type", f"{name} has {len(pictures)} pictures; a row has one image"), None
    file.seek(parts["json"].offset_data)
    try:
        raw = json_rows.parse(file.read(parts["json"].size))
    except Refusal as refusal:
        return refusal, None
    if not isinstance(raw, dict):
        return raw, None
    raw = {"id": name, **raw, "image": name if pictures else None}
    return raw, [tar, pictures[0].offset_data, pictures[0].size] if pictures else None


def members(tar: Path) -> Iterator[tarfile.TarInfo]:
    """The plain files of an uncompressed tar file, in order. Raises DataError if it is none or is cut off."""
    try:
        with tarfile.open(tar, "r:") as opened:
            while (member := opened.next()) is not None:
                opened.members = []  # type: ignore[attr-defined]  # which tarfile would collect
                if member.isreg() and not member.issparse():
                    yield member
            with tar.open("rb") as file:  # a whole one ends with empty blocks
                file.seek(opened.offset)
                cut = len(file.read(512)) < 512
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar} is no uncompressed tar file, or is damaged: {error}; fetch it again, or unpack it") from None
    if cut:
        raise DataError(f"{tar} is cut off after {tar.stat().st_size:,} bytes; fetch it again")


def _cut(path: Path, offset: int, size: int, max_mib: float) -> bytes:
    if size > max_mib * 2**20:
        raise too_large(f"{path} at byte {offset:,}", size, max_mib)
    return os.pread(_opened(path).fileno(), size, offset)


@lru_cache(maxsize=8)  # images of a part lie beside one another
def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise Refusal("missing_file", f"{path} cannot be read: {error}") from None


# --- Parquet ----------------------------------------------------------------------------------------------------------


class Parquet:
    """Files as the Hugging Face hub has them: a column `image` ({bytes, path} or bytes) or `images` (a list of one), beside
    `conversations` as LLaVA has them, or `texts` ([{user, assistant}], as The Cauldron and FineVision have them), and
    perhaps `id` and `kind`."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    @property
    def paths(self) -> list[Path]:
        return self.files

    def rows(self) -> Iterator[Found]:
        number = 0
        for index, path in enumerate(self.files):
            file = _parquet(path)
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            column = next((name for name in ("image", "images") if name in file.schema_arrow.names), None)
            wanted = [leaf for leaf in leaves if leaf.split(".")[0] in ("id", "kind", "conversations", "texts")]
            # all of the column but the pictures themselves, whose nulls these leaves share
            wanted += [leaf for leaf in leaves if column and leaf.split(".")[0] == column and not leaf.endswith("bytes")]
            for group in range(file.num_row_groups):
                table = _read(path, group, wanted)
                for place, raw in enumerate(table.to_pylist()):
                    number += 1
                    yield Found(number, *_parquet_row(raw, f"{path.stem}/{number}", column, [index, group, place]))

    def members(self) -> Iterator[tuple[str, Place]]:
        return iter(())

    def image(self, place: Place, max_mib: float) -> bytes:
        index, group, row = place
        value = _pictures(self.files[index], group)[row].as_py()
        value = value[0] if isinstance(value, list) else value
        content = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise Refusal(
                "missing_file", f"{self.files[index]}, row group {group}, row {row} names a picture without holding it"
            )
        return content


def _parquet_row(raw: dict[str, Any], name: str, column: str | None, place: Place) -> tuple[Any, Place | None]:
    value = raw.pop(column, None) if column else None
    pictures = (0 if value is None else len(value)) if column == "images" else int(value is not None)
    if pictures > 1:
        return Refusal("wrong_type", f"{name} has {pictures} pictures; a row has one image"), None
    row = {key: value for key, value in raw.items() if value is not None}
    if "conversations" not in row and (texts := row.pop("texts", None)) is not None:
        row["conversations"] = [
            {"from": role, "value": text[key]} for text in texts for role, key in (("human", "user"), ("gpt", "assistant"))
        ]
        if pictures and row["conversations"] and "<image>" not in str(row["conversations"][0]["value"]):
            row["conversations"][0]["value"] = f"<image>\n{row['conversations'][0]['value']}"
    return {"id": name, **row, "image": name if pictures else None}, place if pictures else None


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file, or is cut off: {error}; fetch it again") from None


def _read(path: Path, group: int, columns: list[str]) -> Any:
    import pyarrow as pa

    try:
        return _parquet(path).read_row_group(group, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: row group {group} is damaged: {error}; fetch it again") from None


@lru_cache(maxsize=1)  # rows of a part follow one another
def _pictures(path: Path, group: int) -> Any:
    names = _parquet(path).schema_arrow.names
    return _read(path, group, ["image" if "image" in names else "images"]).column(0).combine_chunks()
