"""`source: llava`: a user's own LLaVA-format annotations and image folder.

Rows are `{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}, ...], "kind"}`, a JSON list or one a line;
`image` may be absent (a text-only row), `kind` too (it groups scores; `instruction` or `text` then). A row that cannot
be used is refused with its reason; the rest goes on. All rows about one file are stored with it, and the split goes
by the picture's pixels, so that copies of a picture under other names never cross splits.

Annotations are held in memory, images one at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from components.artifacts import Split
from components.dataset.images import Refusal, load
from components.dataset.source import Provenance, Refused, Source
from components.errors import DataError
from components.settings import DataLimits, DataSettings, LlavaFolder
from components.shards import ImageRow, Turn

MARK = "<image>"
LICENCE = "These are your own data; their licence is known to you. Note it here before you pass the data set on."


class Row(NamedTuple):
    """A row whose text is in order; its image is not looked at yet."""

    number: int
    id: str
    kind: str
    image: str | None  # relative to the image folder
    turns: tuple[Turn, ...]


def source(settings: DataSettings) -> Source:
    """Raises DataError if the annotations or the image folder cannot be read, or hold no row."""
    folder = settings.llava
    assert folder is not None  # settings guarantee it
    if not folder.images.is_dir():
        raise DataError(f"params/data.yaml: llava.images: {folder.images} is no folder")
    refused: list[Refused] = []
    rows: list[Row] = []
    rows_in, ids = 0, set[str]()
    for number, raw in _read(folder.annotations):
        rows_in += 1
        try:
            row = check(number, raw, settings.limits)
            if row.id in ids:
                raise Refusal("duplicate_id", f"the id {row.id!r} was used before")
            ids.add(row.id)
            rows.append(row)
        except Refusal as refusal:
            refused.append(_refused(number, raw, refusal))
    if rows_in == 0:
        raise DataError(f"{folder.annotations} holds no row")
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(f"text:{row.id}" if row.image is None else row.image, []).append(row)
    return Source(
        title=f"{folder.annotations.name} with the images of {folder.images}",
        licence=LICENCE,
        images=len(by_image),
        rows_in=rows_in,
        rows=_rows(by_image, folder, settings, refused),
        refused=refused,
    )


def _rows(
    by_image: dict[str, list[Row]], folder: LlavaFolder, settings: DataSettings, refused: list[Refused]
) -> Iterator[tuple[ImageRow, Provenance]]:
    for image_id, rows in by_image.items():
        file, content = rows[0].image, None
        try:
            if file is not None:
                content, digest = load(folder.images / file, settings.limits)
            else:
                digest = hashlib.sha256(repr(rows[0].turns).encode()).hexdigest()
        except Refusal as refusal:
            refused += [Refused(row=row.number, id=row.id, reason=refusal.reason, detail=refusal.detail) for row in rows]
            continue
        samples = tuple((row.id, row.kind, row.turns) for row in rows)
        split = assign(digest, settings.seed, folder)
        yield ImageRow(image_id, content, samples), Provenance(image_id=image_id, split=split, file=file, sha256=digest)


def assign(digest: str, seed: int, folder: LlavaFolder) -> Split:
    """The split of a picture: a fixed draw in 0..1 made of the seed and the picture."""
    draw = int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()[:8]) / 2**64
    if draw < folder.test:
        return "test"
    return "val" if draw < folder.test + folder.val else "train"


# --- reading the annotations ------------------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and content of each row; a JSONL line that is no JSON comes as the Refusal that it deserves."""
    try:
        with path.open("rb") as file:
            is_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
            file.seek(0)
            yield from enumerate(_parse(file.read()), start=1) if is_list else _lines(file)
    except FileNotFoundError:
        raise DataError(f"params/data.yaml: llava.annotations: {path} is missing") from None
    except OSError as error:
        raise DataError(f"params/data.yaml: llava.annotations: {path} cannot be read: {error.strerror}") from None
    except Refusal as refusal:
        raise DataError(f"{path} is no JSON list: {refusal.detail}") from None


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, _parse(line)
            except Refusal as refusal:
                yield number, refusal


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Refusal("malformed_json", str(error)) from None


def _refused(number: int, raw: Any, refusal: Refusal) -> Refused:
    id_ = raw.get("id") if isinstance(raw, dict) else None
    known = str(id_).encode("utf-8", "replace").decode() if isinstance(id_, str | int) else None
    return Refused(row=number, id=known, reason=refusal.reason, detail=refusal.detail)


# --- checking one row -------------------------------------------------------------------------------------------------


def check(number: int, raw: Any, limits: DataLimits) -> Row:
    """A row as JSON -> a Row. Raises Refusal: malformed_json, wrong_type, missing_key, image_path, turns, empty_answer,
    empty_question, image_marks or too_long."""
    if isinstance(raw, Refusal):
        raise raw
    if not isinstance(raw, dict):
        raise Refusal("wrong_type", f"a row is a JSON object, not {type(raw).__name__}")
    for key in ("id", "conversations"):
        if key not in raw:
            raise Refusal("missing_key", f"there is no {key!r}")
    if isinstance(raw["id"], bool) or not isinstance(raw["id"], str | int):
        raise Refusal("wrong_type", f"'id' is text or a whole number, not {type(raw['id']).__name__}")
    image = None if raw.get("image") is None else _image_path(raw["image"])
    kind = _text(raw.get("kind", "text" if image is None else "instruction"), "'kind'")
    turns = _turns(raw["conversations"], limits.max_text_chars)
    _check_marks(turns, image is not None)
    if image is not None:  # wherever the question had its image, the template puts it first
        question = turns[0].question.replace(MARK, "").strip()
        turns = (Turn(f"{MARK}\n{question}", turns[0].answer), *turns[1:])
    return Row(number, _text(str(raw["id"]), "'id'"), kind, image, turns)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Refusal("wrong_type", f"{what} is text with something in it, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refusal("wrong_type", f"{what} holds half of a surrogate pair, which is no text") from None
    return value


def _image_path(value: Any) -> str:
    """Inside the folder by its spelling; links that the user has put there are followed."""
    if isinstance(value, list):
        raise Refusal("wrong_type", "'image' is a list; a row has one image")
    path = PurePosixPath(_text(value, "'image'"))
    if path.is_absolute() or ".." in path.parts:
        raise Refusal("image_path", f"{value!r} leads out of the image folder")
    return str(path)


def _turns(conversation: Any, max_chars: int) -> tuple[Turn, ...]:
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        raise Refusal("wrong_type", "'conversations' is a list of {from, value}")
    for turn in conversation:
        for key in ("from", "value"):
            if key not in turn:
                raise Refusal("missing_key", f"a turn has no {key!r}")
    roles = [turn["from"] for turn in conversation]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        raise Refusal("turns", f"turns are human, gpt, human, gpt, ..., not {', '.join(map(str, roles[:6])) or 'none'}")
    values = [turn["value"] for turn in conversation]
    if not all(isinstance(value, str) for value in values):
        raise Refusal("wrong_type", "the 'value' of a turn is text")
    chars = sum(map(len, values))
    if chars > max_chars:
        raise Refusal("too_long", f"the conversation has {chars:,} characters, more than limits.max_text_chars = {max_chars:,}")
    for question, answer in zip(values[::2], values[1::2], strict=True):
        if not answer.strip():
            raise Refusal("empty_answer", "an answer is empty")
        if not question.replace(MARK, "").strip():
            raise Refusal("empty_question", "a question is empty")
    return tuple(Turn(_text(q, "a question"), _text(a, "an answer")) for q, a in zip(values[::2], values[1::2], strict=True))


def _check_marks(turns: tuple[Turn, ...], has_image: bool) -> None:
    first = turns[0].question.count(MARK)
    others = sum((turn.question + turn.answer).count(MARK) for turn in turns) - first
    if (first, others) != (int(has_image), 0):
        raise Refusal(
            "image_marks",
            f"{first} {MARK} in the first question and {others} elsewhere, for {'one image' if has_image else 'no image'}",
        )
