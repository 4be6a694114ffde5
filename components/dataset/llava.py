"""One row in the LLaVA format, checked: what every source of a user's own is made of.

`{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}, ...], "kind"}`; `image` may be absent (a text-only
row), `kind` too (it groups scores; `instruction` or `text` then). A human's turn may have `boxes`, the
region that it asks about.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from components.dataset.images import Refusal
from components.settings import DataLimits
from components.shards import Box, Turn

MARK = "<image>"


class Row(NamedTuple):
    """A row whose text is in order; its image is not looked at yet."""

    number: int
    id: str
    kind: str
    image: str | None  # relative to the image folder, or a name in tar files
    turns: tuple[Turn, ...]


def check(number: int, raw: Any, limits: DataLimits) -> Row:
    """A row as JSON -> a Row. Raises Refusal: malformed_json, wrong_type, missing_key, image_path, turns, empty_answer,
    empty_question, image_marks, boxes or too_long."""
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
    if image is None and any(turn.boxes for turn in turns):
        raise Refusal("boxes", "'boxes' are regions of an image, and the row has none")
    if image is not None:  # wherever the question had its image, the template puts it first
        question = turns[0].question.replace(MARK, "").strip()
        turns = (replace(turns[0], question=f"{MARK}\n{question}"), *turns[1:])
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
    boxes = [_boxes(turn.get("boxes")) for turn in conversation[::2]]
    texts = zip(values[::2], values[1::2], boxes, strict=True)
    return tuple(Turn(_text(question, "a question"), _text(answer, "an answer"), region) for question, answer, region in texts)


def _boxes(value: Any) -> tuple[Box, ...]:
    """`[[left, top, right, bottom], ...]` as shares of the upright image's width and height."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(box, list) and len(box) == 4 for box in value):
        raise Refusal("boxes", "'boxes' is a list of [left, top, right, bottom]")
    for box in value:
        if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in box):
            raise Refusal("boxes", f"a box is four numbers, not {box}")
        left, top, right, bottom = box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise Refusal("boxes", f"{box} is no [left, top, right, bottom] in shares of the image's width and height, 0 to 1")
    return tuple((float(left), float(top), float(right), float(bottom)) for left, top, right, bottom in value)


def _check_marks(turns: tuple[Turn, ...], has_image: bool) -> None:
    first = turns[0].question.count(MARK)
    others = sum((turn.question + turn.answer).count(MARK) for turn in turns) - first
    if (first, others) != (int(has_image), 0):
        raise Refusal(
            "image_marks",
            f"{first} {MARK} in the first question and {others} elsewhere, for {'one image' if has_image else 'no image'}",
        )
