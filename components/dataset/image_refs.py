"""References of a row to its images: paths in the image folder, places in the source's own files, or data URLs."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from components.dataset.changes import Changes
from components.dataset.json_values import checked_text, is_empty, short
from components.dataset.media import MEDIA_BASE64, Held
from components.errors import Refusal

IMAGE_KEYS = ("image", "images")


def image_refs(
    raw: dict[str, Any], marks: list[str | Held | None], places: list[Any], folder: Path | None, changes: Changes
) -> tuple[str | Held, ...]:
    """References in the order of their marks: those of the parts, and those of the keys that are not the same ones again.

    Args:
        marks: image of each mark of the conversation that is a part with one; None for the others.
        places: `index` within the row's images, of each part without an image.
        folder: image folder; absolute paths in it are made relative to it.

    Raises Refusal: wrong_type, missing_file, image_path or image_marks.
    """

    def checked(reference: str | Held) -> str | Held:
        if isinstance(reference, Held) or reference.startswith("data:"):
            return reference
        return _path(reference, folder, changes)

    marks = [None if mark is None else checked(mark) for mark in marks]
    references = [mark for mark in marks if mark is not None]
    for key in IMAGE_KEYS:
        listed = list(map(checked, _listed(raw[key], key, changes))) if key in raw else []
        if len(listed) > len(references) and all(reference in listed for reference in references):
            references = listed
        elif not all(reference in references for reference in listed):
            changes.rules["joined_images"] = f"{len(listed)} of another key were put after the first {len(references)}"
            references = [*references, *listed]
    if any(mark not in (None, reference) for mark, reference in zip(marks, references, strict=False)):
        raise Refusal("image_marks", "marks without an image of their own stand before parts with one: which is meant?")
    if all(place is None for place in places):
        return tuple(references)
    chosen = [references[int(place)] for place in places if place in range(len(references))]
    if len(chosen) < len(places) or not all(reference in chosen for reference in references):
        raise Refusal("image_marks", f"the parts' 'index' is {places}, for {len(references)} images: which is meant?")
    return tuple(chosen)


def pointer(value: Any, where: str) -> str | Held:
    """Reference of one value. Base64 content becomes a data URL."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "path", "url") if isinstance(value.get(key), str) and value[key]), value)
    if isinstance(value, str) and MEDIA_BASE64.match(value):
        return f"data:image/*;base64,{value}"
    if isinstance(value, str) and value[:5].lower() == "data:":
        return f"data:{value[5:]}"
    if isinstance(value, str | Held):
        return value
    raise Refusal("wrong_type", f"{where} is the path of an image, not {type(value).__name__}")


def _listed(value: Any, key: str, changes: Changes) -> list[str | Held]:
    listed = [one for one in value if not is_empty(one)] if isinstance(value, list) else [value]
    if isinstance(value, list) and 0 < len(listed) < len(value):
        changes.rules["null_image"] = f"{key!r} holds null beside {len(listed)} image{'s' * (len(listed) > 1)}"
    elif isinstance(value, list) and len(listed) == 1:
        changes.rules["image_list"] = f"{key!r} was a list of one"
    return [pointer(one, repr(key)) for one in listed]


def _path(value: str, folder: Path | None, changes: Changes) -> str:
    """Path relative to the image folder, checked by its spelling: symbolic links in the folder are followed."""
    value = checked_text(value, "'image'").removeprefix("file://")
    if "://" in value:
        raise Refusal("missing_file", f"{short(value)} is an address, and nothing is fetched: name a file of the image folder")
    path = PurePosixPath(value)
    roots = [] if folder is None or not path.is_absolute() else [folder.absolute(), folder.resolve()]
    for root in roots:
        if path.is_relative_to(root):
            changes.rules["absolute_path"] = f"{str(path)!r} was read as relative to the image folder"
            path = path.relative_to(root)
            break
    if path.is_absolute() or ".." in path.parts:
        raise Refusal("image_path", f"{short(value)} leads out of the image folder, or goes up in it (..)")
    return str(path)
