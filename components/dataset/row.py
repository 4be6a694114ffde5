"""Validation and normalisation of rows in the formats of public data sets: the rules that JSON, JSONL, tar and Parquet files
share. docs/data.md has the table of rules; `Row.rules` names each rule that changed a row.

A row is text-only only if nothing in it can be an image, a video or audio; unknown media are refused, naming the key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from components.config.data import DataLimits
from components.dataset.changes import Changes, is_unlearnt
from components.dataset.image_marks import match_marks, place_marks, refuse_foreign
from components.dataset.image_refs import IMAGE_KEYS, image_refs
from components.dataset.json_values import checked_text, is_empty, short
from components.dataset.media import VIDEO, Held, may_be_media
from components.dataset.shards import CAPTION as CAPTION_KIND
from components.dataset.shards import IMAGE as MARK
from components.dataset.shards import Turn
from components.dataset.turns import GPT, HUMAN, INSTRUCTIONS, Message, TurnReader
from components.errors import Refusal

CONVERSATION = ("conversations", "messages", "texts")
PROMPT = ("prompt", "completion")  # two lists of turns, one after the other
CAPTION = "txt"  # WebDataset's caption
DESCRIBE = "Describe the image."
# Number within the source, from 1; name for a row without an id; JSON, or the reader's Refusal
NumberedRow = tuple[int, str, Any]


class Row(NamedTuple):
    """Row of valid text; its images are not opened yet."""

    number: int
    id: str | None  # None: the row has no id
    kind: str
    pictures: tuple[str | Held, ...]  # paths within the folder, names in tar files, or data URLs; empty: text-only
    samples: tuple[tuple[Turn, ...], ...]  # one; several for a long row of `texts`
    rules: dict[str, str]  # rule -> change it made
    ignored: tuple[str, ...]  # keys that no rule reads


def understand(number: int, raw: Any, limits: DataLimits, folder: Path | None = None) -> Row:
    """Row from parsed JSON. `folder`: image folder; absolute paths in it are made relative to it.

    Raises Refusal: malformed_json, wrong_type, missing_key, missing_file, image_path, video, unread_media, turns,
    empty_answer, empty_question, image_marks, boxes or too_long; or `raw` itself if it is the reader's Refusal.
    """
    if isinstance(raw, Refusal):
        raise raw
    if not isinstance(raw, dict):
        raise Refusal("wrong_type", f"a row is a JSON object, not {type(raw).__name__}")
    try:
        return _understood(number, {key: value for key, value in raw.items() if not is_empty(value)}, limits, folder)
    except RecursionError:
        raise Refusal("malformed_json", "a value is nested too deeply") from None


def _understood(number: int, raw: dict[str, Any], limits: DataLimits, folder: Path | None) -> Row:
    changes = Changes()
    reader = TurnReader(changes)
    row_id = _id(raw.get("id"), changes)
    keys, conversation = _conversation(raw)
    system = [reader.text(raw[key], key) for key in INSTRUCTIONS if key in raw]
    messages, independent = reader.read(conversation) if keys else (_caption(raw, reader), False)
    pictures = image_refs(raw, reader.marks, reader.places, folder, changes)
    _note_unread(raw, {"id", "kind", *(keys or (CAPTION,)), *INSTRUCTIONS, *IMAGE_KEYS}, pictures, changes)
    if not keys and not pictures:
        raise Refusal("missing_key", f"{CAPTION!r} is a caption, and no image is beside it")

    turns = reader.alternating(messages, system)
    refuse_foreign(turns, len(pictures), "objects" in raw)
    dropped = reader.dropped_marks(HUMAN), reader.dropped_marks(GPT)
    turns, independent = match_marks(turns, len(pictures), dropped, independent, changes)
    pictures = pictures[: len(pictures) - sum(dropped)]
    if len(pictures) != 1 and any(turn.boxes for turn in turns):
        raise Refusal("boxes", f"'boxes' are regions of one image, and the row has {len(pictures) or 'none'}")
    marked = any(MARK in turn.question for turn in turns)
    parts = _within_limit(turns, independent, limits.max_text_chars, changes)
    samples = tuple(tuple(place_marks(part, len(pictures), marked and not index, changes)) for index, part in enumerate(parts))
    pictures = pictures[: sum(turn.question.count(MARK) for turn in samples[0])]  # without those of cut turns
    kind = checked_text(raw.get("kind", "instruction" if pictures else "text"), "'kind'")
    if kind == CAPTION_KIND:
        changes.rules["caption_kind"] = f"its kind is {kind!r}: trained on in stage align alone, never scored"
    return Row(number, row_id, kind, pictures, samples, changes.rules, tuple(changes.ignored))


def _id(row_id: Any, changes: Changes) -> str | None:
    if isinstance(row_id, float) and row_id.is_integer():
        row_id = int(row_id)
    if row_id is None or (isinstance(row_id, str) and not row_id.strip()):
        changes.rules["numbered"] = "it had no id"
        return None
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise Refusal("wrong_type", f"'id' is text or a whole number, not {type(row_id).__name__}")
    return checked_text(str(row_id), "'id'")


def _conversation(raw: dict[str, Any]) -> tuple[tuple[str, ...], Any]:
    """Keys of the conversation and their content; no key for a caption."""
    if keys := [key for key in CONVERSATION if key in raw]:
        for other in keys[1:]:
            _refuse_second(raw[keys[0]], raw[other], f"{other!r} beside {keys[0]!r}")
        return (keys[0],), raw[keys[0]]
    if all(isinstance(raw.get(key), list) for key in PROMPT):
        return PROMPT, [turn for key in PROMPT for turn in raw[key]]
    if CAPTION not in raw:
        has = ", ".join(map(repr, raw)) or "nothing"
        raise Refusal(
            "missing_key",
            f"there is no {', '.join(map(repr, CONVERSATION))}, or nothing in it; the row has {has}: write its words as"
            " conversations: [{from: human, value: ...}, {from: gpt, value: ...}]",
        )
    return (), None


def _refuse_second(conversation: Any, other: Any, keys: str) -> None:
    """Raises Refusal if a second conversation of the row has other words than the first."""
    try:
        first, second = (
            [(message.role, message.text.replace(MARK, " ").split()) for message in TurnReader(Changes()).read(value)[0]]
            for value in (conversation, other)
        )
    except Refusal:  # one is no conversation: it is refused where it is read, or is an ignored key
        return
    if first != second:
        raise Refusal("turns", f"the row has two conversations, {keys}, and they differ: drop one of them")


def _caption(raw: dict[str, Any], reader: TurnReader) -> list[Message]:
    reader.rules["caption"] = f"a caption became the answer to {DESCRIBE!r}"
    return [Message(HUMAN, DESCRIBE), Message(GPT, reader.text(raw[CAPTION], CAPTION))]


def _note_unread(raw: dict[str, Any], known: set[str], shown: tuple[str | Held, ...], changes: Changes) -> None:
    """Record the keys that no rule reads. `shown`: images read. Raises Refusal if one may hold other media."""
    for key, value in raw.items():
        if key in known:
            continue
        if may_be_media(key, value, shown):
            what = "video" if VIDEO.search(f"{key} {short(value)}") else "unread_media"
            name = "" if shown else "; the row's image is named 'image'"
            raise Refusal(what, f"{key!r} may be a picture, a video or a sound, and is not read: {short(value)}{name}")
        if is_unlearnt(key, value) or (key == "label" and value is False):
            raise Refusal("turns", f"{key!r} is {short(value)}: the row is not to be trained on as it stands")
        changes.ignored[key] = None


def _within_limit(turns: list[Turn], independent: bool, most: int, changes: Changes) -> list[list[Turn]]:
    """Whole turns of at most `most` characters: a conversation is cut, independent pairs become several samples."""
    for turn in turns:
        if not turn.answer.strip():
            raise Refusal("empty_answer", "an answer is empty")
        if not turn.question.replace(MARK, "").strip():
            raise Refusal("empty_question", "a question is empty")
        checked_text(turn.question, "a question")
        checked_text(turn.answer, "an answer")
    samples: list[list[Turn]] = []
    left = 0
    for turn in turns:
        chars = len(turn.question) + len(turn.answer)
        if chars > most and (independent or not samples):
            raise Refusal("too_long", f"a turn has {chars:,} characters, more than limits.max_text_chars = {most:,}")
        if not samples or chars > left:
            if samples and not independent:
                kept = len(samples[0])
                changes.rules["cut_at_turn"] = f"{kept} of {len(turns)} turns are within limits.max_text_chars = {most:,}"
                break
            samples.append([])
            left = most
        samples[-1].append(turn)
        left -= chars
    if len(samples) > 1:
        changes.rules["several_samples"] = f"{len(turns)} questions became {len(samples)} samples"
    return samples
