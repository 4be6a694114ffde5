"""Readers of a source's rows and images: JSON lists, JSONL, WebDataset or Parquet, optionally with an image folder or tars.

A store reads the rows of one source in order, without image bytes, and gives each image's place, by which any process can
read it later. Nothing is unpacked.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from components.dataset import json_rows, parquet, tars
from components.dataset.images import read
from components.dataset.row import NumberedRow
from components.errors import DataError, Refusal, TryAgainError, first_line, machine_error
from components.io import is_lfs_pointer

HUB = "hf://datasets/"
Place = list[Any]  # JSON: location of an image for `Store.image`


def _json(files: list[Path]) -> Iterator[NumberedRow]:
    """Rows of all files, numbered in one sequence and named by their number."""
    before = 0
    for path in files:
        number = 0
        for number, raw in json_rows.rows(path):
            yield before + number, str(before + number), raw
        before += number


READERS: dict[str, Callable[[list[Path]], Iterator[NumberedRow]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".tar": tars.rows,
    ".parquet": parquet.rows,
}


@dataclass(frozen=True)
class Store:
    """Files of one source. Images are paths in `folder`, members of `tars`, or bytes in the rows' own files."""

    files: list[Path]
    kind: str  # format of the files: a key of READERS
    folder: Path | None = None
    tars: tuple[Path, ...] = ()

    def rows(self) -> Iterator[NumberedRow]:
        """Rows in order. Raises DataError if the files cannot be read or are truncated."""
        return READERS[self.kind](self.files)

    def names(self) -> Iterator[tuple[str, Place]]:
        """Name and place of every member of the tar files beside the rows."""
        return ((name, [len(self.files) + tar, *where]) for name, (tar, *where) in tars.names(list(self.tars)))

    @property
    def paths(self) -> list[Path]:
        """Row files and tar files, by number in an image's place; a change of one invalidates a draft."""
        return [*self.files, *self.tars]

    def image(self, place: Place, max_mib: float) -> bytes:
        """Image bytes. Raises Refusal: missing_file, too_large, not_an_image; DataError for damaged Parquet."""
        if len(place) == 1:
            return self._named(place[0], max_mib)
        which, *where = place
        path = self.paths[which]
        if self.kind == ".parquet" and which < len(self.files):
            return parquet.content(path, *where)
        offset, size = where
        return tars.content(path, offset, size, max_mib)

    def _named(self, path: str, max_mib: float) -> bytes:
        if path.startswith("data:"):
            return _decoded(path)
        if self.folder is None:
            raise Refusal("missing_file", f"{path!r} names a file, and the source has no folder of `images`")
        return read(self.folder / path, max_mib)


def _decoded(url: str) -> bytes:
    """Content of a data URL. Raises Refusal not_an_image."""
    head, _, content = url.partition(",")
    try:
        if head.lower().endswith(";base64"):
            return base64.b64decode("".join(content.split()), validate=True)
        return unquote_to_bytes(content)
    except ValueError as error:  # of base64 or of UTF-8
        raise Refusal("not_an_image", f"the data URL {head!r} has no content: {error}") from None


def store(files: str, images: Path | None) -> Store:
    """Store for `files`, by their extension, and their `images`. Raises DataError if format or files are missing."""
    ending = Path(files).suffix.lower()
    kind = ending if ending in READERS else ".json"
    if images is None and kind != ending and not Path(files).is_dir():
        raise DataError(f"params/data.yaml: {files} ends in none of {', '.join(READERS)}; unpack or convert it")
    paths = matching_files(files)
    if images is None or images.is_dir():
        return Store(paths, kind, folder=images)
    if images.suffix.lower() != ".tar":
        raise DataError(f"params/data.yaml: images: {images} is no folder, and no tar files either: x/*.tar")
    return Store(paths, kind, tars=tuple(matching_files(str(images))))


def matching_files(pattern: str) -> list[Path]:
    """Files that match a name or pattern, sorted. Raises DataError for none, TryAgainError if the hub is unreachable."""
    local = Path(_downloaded(pattern) if pattern.startswith(HUB) else pattern)
    paths = (
        [local] if local.is_file() or local.is_dir() else sorted(Path(local.anchor).glob(str(local.relative_to(local.anchor))))
    )
    if folders := [path for path in paths if path.is_dir()]:
        raise DataError(f"params/data.yaml: {folders[0]} is a folder; name the files in it: {folders[0]}/*{local.suffix}")
    if not paths:
        braces = "; a pattern has *, ** and ?, no braces" if "{" in pattern else ""  # WebDataset's {000..123}
        raise DataError(f"params/data.yaml: there is no file {pattern}{braces}")
    if "**" in local.parts:
        start = local.parts.index("**")
        _refuse_links(Path(*local.parts[:start]), str(Path(*local.parts[start:])), paths)
    if odd := next((path for path in map(str, paths) if path.encode("utf-8", "ignore").decode() != path), None):
        raise DataError(f"params/data.yaml: rename a file of {pattern} whose name is no UTF-8: {odd!a}")
    if pointer := next(filter(is_lfs_pointer, paths), None):
        raise DataError(f"{pointer}: a pointer of Git LFS; `git lfs pull` in that folder brings the file")
    return paths


def _refuse_links(folder: Path, pattern: str, found: list[Path]) -> None:
    """Raises DataError for a link to a folder with files that are not `found`: `**` follows none."""
    for at, names, _ in os.walk(folder):
        for link in filter(Path.is_symlink, (Path(at, name) for name in sorted(names))):
            known = {path.resolve() for path in found}
            if any(path.is_file() and path.resolve() not in known for path in link.glob(pattern)):
                raise DataError(f"params/data.yaml: {link} is a link, which ** does not follow: name {link.resolve()}, too")


def _downloaded(address: str) -> str:
    """Download of hf://datasets/ORG/NAME@COMMIT/PATTERN; returns the local pattern."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    where, _, rest = address.removeprefix(HUB).partition("@")
    commit, _, pattern = rest.partition("/")
    if where.count("/") != 1 or len(commit) != 40 or not pattern:
        raise DataError(f"params/data.yaml: {address} is not {HUB}ORG/NAME@COMMIT/FILES, with all 40 digits of the commit")
    try:
        # The hub's `**/` is one folder or more, a local one none or more; its `*` matches the / of folders, too.
        allowed = [pattern.replace("**/", "*")]
        folder = snapshot_download(where, repo_type="dataset", revision=commit, allow_patterns=allowed)
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
    except HFValidationError as error:
        raise DataError(f"params/data.yaml: {address}: {error}") from None
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: of hf_xet, whatever happened
        raise machine_error(error) or TryAgainError(f"{address}: the download stopped: {first_line(error)}") from None
    return str(Path(folder) / pattern)
