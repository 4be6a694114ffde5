"""Reader of uncompressed tar files, in place: as image folders of rows, or as WebDataset."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from components.dataset import json_rows
from components.dataset.image_refs import IMAGE_KEYS
from components.dataset.images import too_large, unreadable
from components.dataset.media import MEDIA_FILE, Held
from components.dataset.row import CAPTION, CONVERSATION, NumberedRow
from components.errors import DataError, Refusal

LINK = " -> "  # separates extension and target of what is no plain file in `Member.ending`
KEY = re.compile(r"((?:.*/)?\.*[^./]*)\.?([^/]*)", re.DOTALL)  # a name up to its first dot inside, and its ending
ARCHIVER = re.compile(r"(^|/)(__MACOSX/|\._|\.DS_Store$)")  # metadata of an archiver
PICTURES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff")


class Member(NamedTuple):
    ending: str  # extension, from the first dot on
    offset: int
    size: int


def rows(tars: list[Path]) -> Iterator[NumberedRow]:
    """Rows of a WebDataset: the members of one tar file that share a name up to its first dot are one sample, in any order.

    KEY.json holds a row, KEY.txt a caption, KEY.jpg (or another image format) the image, which overrides the row's.
    Raises DataError for a tar file without a row.
    """
    number = 0
    for index, tar in enumerate(tars):
        samples: dict[str, list[Member]] = {}
        for member in members(tar):
            name = str(PurePosixPath(member.name)).lstrip("/")
            if not ARCHIVER.search(name):
                key, ending = KEY.fullmatch(name).groups()  # type: ignore[union-attr]  # any name matches
                ending = ending.lower() if _plain(member) else f"{ending}{LINK}{member.linkname or 'no plain file'}"
                samples.setdefault(key, []).append(Member(ending, member.offset_data, member.size))
        alone = [key for key, parts in samples.items() if all(MEDIA_FILE.search(f".{ending}") for ending, *_ in parts)]
        if samples and len(alone) == len(samples):
            raise DataError(
                f"{tar} holds pictures, videos or sounds, and no row: put each beside its row, KEY.json, or give rows in a JSON"
                " file as `files` and the tar files as `images`"
            )
        by_name = {key.rpartition("/")[2]: key for key in alone}
        with tar.open("rb") as file:
            for key, parts in samples.items():
                name = f"{tar.stem}/{key}"
                other = by_name.get(key.rpartition("/")[2], key)
                apart = Refusal(
                    "ambiguous_name", f"{tar.stem}/{other} may be its picture, and is not beside {name}.json in {tar}"
                )
                is_apart = [part.ending for part in parts] == ["json"] and other != key
                for raw in [apart] if is_apart else _sample(file, name, parts, index):
                    number += 1
                    yield number, name, raw


def _sample(file: Any, name: str, parts: list[Member], tar: int) -> list[Any]:
    """Row of a key; if it is refused, the refusal for each row that its members hold."""
    try:
        return [_row(file, name, parts, tar)]
    except Refusal as refusal:
        endings = [f".{part.ending.partition(LINK)[0]}" for part in parts]
        jsons, captions = (sum(ending.endswith(kind) for ending in endings) for kind in (".json", f".{CAPTION}"))
        return [refusal] * (endings.count(".json") or jsons or captions or 1)


def _row(file: Any, name: str, members: list[Member], tar: int) -> Any:
    parts = {part.ending: part for part in reversed(members)}
    for ending in parts if len(parts) < len(members) else ():
        if len(same := [str(part.offset) for part in members if part.ending == ending]) > 1:
            raise Refusal("ambiguous_name", f"{name}.{ending} is there {len(same)} times, at bytes {' and '.join(same)}")
    if not {"json", CAPTION} & parts.keys():
        has = ", ".join(sorted(parts))
        raise Refusal("missing_key", f"{name} has {has} and neither json nor {CAPTION}: a key ends at its name's first dot")
    raw = json_rows.parse(_read(file, parts["json"]), f"{name}.json: ") if "json" in parts else {}
    if not isinstance(raw, dict):
        return raw
    raw = dict(raw)
    held = {ending: Held([tar, part.offset, part.size], name) for ending, part in parts.items()}
    kinds = {ending: ending.rpartition(".")[2] for ending in parts if LINK not in ending}
    pictures = [held[ending] for ending in sorted(kinds, key=_in_order) if kinds[ending] in PICTURES]
    if pictures:
        listed: list[Any] = max((raw[key] for key in IMAGE_KEYS if isinstance(raw.get(key), list)), key=len, default=[])
        named = {f"{PurePosixPath(name).name}.{ending}".lower(): held[ending] for ending in kinds if held[ending] in pictures}
        names = [PurePosixPath(str(one)).name.lower() for one in listed]
        if named.keys() == set(names):
            pictures = [named[one] for one in names]
        raw |= {"image": pictures, "images": listed if len(listed) > len(pictures) else None}  # more than the sample has
    if captioned := CAPTION in parts and not any(raw.get(key) for key in CONVERSATION):
        raw[CAPTION] = _text(_read(file, parts[CAPTION]), f"{name}.{CAPTION}")
    for ending, part in parts.items():
        if ending != "json" and not (captioned and ending == CAPTION) and held[ending] not in pictures:
            raw[f".{ending}"] = (
                held[ending] if LINK in ending or MEDIA_FILE.search(f".{ending}") or not _is_text(file, part) else "text"
            )
    return raw


def _in_order(ending: str) -> list[tuple[int, str]]:
    """Natural sort key: 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", ending)]


def _read(file: Any, part: Member, most: int | None = None) -> bytes:
    file.seek(part.offset)
    content: bytes = file.read(part.size if most is None else min(most, part.size))
    return content


def _is_text(file: Any, part: Member) -> bool:
    beginning = _read(file, part, 1024)
    return b"\0" not in beginning and "�" not in beginning.decode("utf-8", "replace").rstrip("�")


def _text(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal("malformed_text", f"{name} is not UTF-8: {error}") from None
    if not text.strip():
        raise Refusal("empty_answer", f"{name} is empty")
    return text


def members(tar: Path) -> Iterator[tarfile.TarInfo]:
    """All but the folders of an uncompressed tar file, in order; bytes of a name that are no UTF-8 are spelt `\\xf6`.

    Raises DataError if it is not one, is truncated, or goes on where tarfile stops: at the end of the first of two joined
    archives, and at a damaged header.
    """
    try:
        with tarfile.open(tar, "r:", errors="backslashreplace") as opened:
            while (member := opened.next()) is not None:
                opened.members = []  # type: ignore[attr-defined]  # or tarfile keeps them all
                if not member.isdir():
                    yield member
            with tar.open("rb") as file:  # a complete archive ends with empty blocks
                file.seek(opened.offset)
                cut = len(file.read(512)) < 512
                file.seek(opened.offset)
                goes_on = any(block.strip(b"\0") for block in iter(lambda: file.read(2**20), b""))
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar} is no uncompressed tar file, or is damaged: {error}; fetch it again, or unpack it") from None
    if cut:
        raise DataError(f"{tar} is cut off after {tar.stat().st_size:,} bytes; fetch it again")
    if goes_on:
        raise DataError(
            f"{tar} goes on after byte {opened.offset:,}, where its first archive ends or is damaged; fetch it again, or join"
            " archives with tar -A"
        )


def _plain(member: tarfile.TarInfo) -> bool:
    """Whether a member's bytes are those of its file, at its place: no link, device or sparse file."""
    return member.isreg() and not member.issparse()


def names(tars: list[Path]) -> Iterator[tuple[str, list[int]]]:
    """Name and place of every plain file."""
    for index, tar in enumerate(tars):
        for member in filter(_plain, members(tar)):
            yield str(PurePosixPath(member.name)), [index, member.offset_data, member.size]


def content(path: Path, offset: int, size: int, max_mib: float) -> bytes:
    """Bytes of one member. Raises Refusal: missing_file or too_large."""
    if size > max_mib * 2**20:
        raise too_large(f"{path} at byte {offset:,}", size, max_mib)
    return os.pread(_opened(path).fileno(), size, offset)


@lru_cache(maxsize=8)  # a part's images are adjacent
def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None
