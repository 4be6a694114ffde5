"""One row of a user's, in any of the shapes that public data sets have -> one checked row: the rules that JSON, JSONL, tar and
Parquet files share. The table of them is in docs/data.md; each rule that changes a row is named in `Row.rules`.

A row is text-only only if nothing in it may be a picture, a video or a sound: what is not understood is refused by name.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from components.config.data import DataLimits
from components.dataset.images import Refusal
from components.dataset.shards import IMAGE as MARK
from components.dataset.shards import Box, Turn

HUMAN, GPT, SYSTEM = "human", "gpt", "system"
ROLES = {"human": HUMAN, "user": HUMAN, "gpt": GPT, "assistant": GPT, "model": GPT, "system": SYSTEM}
CONVERSATION = ("conversations", "messages", "texts")
SPEAKER = (("from", "value"), ("role", "content"))  # the keys of a turn
PAIR = ("user", "assistant")  # roles of `texts`: questions about a picture that do not depend on one another
PICTURE = ("image", "images")
CAPTION = "txt"  # a WebDataset's caption
DESCRIBE = "Describe the image."
Found = tuple[
    int, str, Any
]  # of a row: its number within the source, from 1; its name if it has no id; JSON, or the Refusal of it

MEDIA_FILE = re.compile(
    r"\.(jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|avif|hei[cf]|jp2|jxl|svg|ppm|npy|mp4|m4v|webm|avi|mov|mkv|mpe?g|flv|wmv|3gp|mp3|wav|flac|ogg)"
    r"(\?.*)?$",
    re.IGNORECASE,
)
VIDEO = re.compile(r"video|frames?\b|\.(mp4|m4v|webm|avi|mov|mkv|mpe?g|flv|wmv|3gp)\b", re.IGNORECASE)
MEDIA_DATA = re.compile(r"data:(image|video|audio)/[^,]{0,80},")
MEDIA_KEY = re.compile(
    r"(^|[^a-z])(images?|imgs?|pictures?|pics?|photos?|videos?|frames?|clips?|audios?|media|pixels?)"
    r"([^a-z]*|[^a-z](?P<pointer>ids?|paths?|urls?|files?|filenames?|names?)|[^a-z](bytes|data|list|base64))$",
    re.IGNORECASE,
)
MEDIA_MARK = re.compile(  # other codes' marks: Qwen-VL's <img>path</img>, and <video> or <ImageHere> on a line of its own
    r"<img>[^<\n]+</img>|^\s*<\|?(?:video|audio|img|media|image(?:here|_pad|[ _]?\d+))\|?>\s*$", re.IGNORECASE | re.MULTILINE
)


class Said(NamedTuple):
    role: str
    text: str
    boxes: tuple[Box, ...] = ()


class Held(NamedTuple):
    """A picture, or what may be one, that lies in the source's own files."""

    place: list[Any]
    name: str


class Row(NamedTuple):
    """A row whose text is in order; its pictures are not looked at yet."""

    number: int
    id: str | None  # None: it has none of its own
    kind: str
    pictures: tuple[str | Held, ...]  # each a path within the folder, a name in tar files, or a data URL; none: text-only
    samples: tuple[tuple[Turn, ...], ...]  # one, or several where a row of `texts` is long
    rules: dict[str, str]  # rule that changed the row -> what it did
    ignored: tuple[str, ...]  # keys


def understand(number: int, raw: Any, limits: DataLimits, folder: Path | None = None) -> Row:
    """A row as JSON -> a Row. `folder`: absolute paths in it are taken as relative to it.

    Raises Refusal: malformed_json, wrong_type, missing_key, image_path, video, unread_media, turns,
    empty_answer, empty_question, image_marks, boxes or too_long.
    """
    if isinstance(raw, Refusal):
        raise raw
    if not isinstance(raw, dict):
        raise Refusal("wrong_type", f"a row is a JSON object, not {type(raw).__name__}")
    return _Reading(raw, limits, folder).row(number)


class _Reading:
    """A row being read: what was understood of it so far."""

    def __init__(self, raw: dict[str, Any], limits: DataLimits, folder: Path | None) -> None:
        self.raw = {key: value for key, value in raw.items() if not _nothing(value)}
        self.limits, self.folder = limits, folder
        self.rules: dict[str, str] = {}
        self.shown: list[str | Held] = []  # pictures

    def row(self, number: int) -> Row:
        own = self._id()
        key = next((key for key in CONVERSATION if key in self.raw), None)
        if key is None and CAPTION not in self.raw:
            raise Refusal("missing_key", f"there is no {CONVERSATION[0]!r}, or nothing in it")
        turns, apart = self._turns(self.raw[key]) if key else ([Said(HUMAN, DESCRIBE), Said(GPT, self._caption())], False)
        pictures = self._pictures()
        ignored = self._left_over({"id", "kind", "system", key or CAPTION, *PICTURE}, bool(pictures))
        said, apart = self._marked(self._alternating(turns), len(pictures), apart)
        if len(pictures) != 1 and any(turn.boxes for turn in said):
            raise Refusal("boxes", f"'boxes' are regions of one image, and the row has {len(pictures) or 'none'}")
        marked = any(MARK in turn.question for turn in said)
        samples = tuple(
            tuple(_placed(sample, len(pictures), marked and not index))
            for index, sample in enumerate(self._within_limit(said, apart))
        )
        pictures = pictures[: sum(turn.question.count(MARK) for turn in samples[0])]  # turns may have been cut
        kind = _text(self.raw.get("kind", "instruction" if pictures else "text"), "'kind'")
        return Row(number, own, kind, pictures, samples, self.rules, ignored)

    def _id(self) -> str | None:
        own = self.raw.get("id")
        if own is None or (isinstance(own, str) and not own.strip()):
            self.rules["numbered"] = "it had no id"
            return None
        if isinstance(own, bool) or not isinstance(own, str | int):
            raise Refusal("wrong_type", f"'id' is text or a whole number, not {type(own).__name__}")
        return _text(str(own), "'id'")

    def _caption(self) -> str:
        self.rules["caption"] = f"a caption became the answer to {DESCRIBE!r}"
        return self._words(self.raw[CAPTION], CAPTION)

    # --- turns ---

    def _turns(self, value: Any) -> tuple[list[Said], bool]:
        """The turns, and whether they are pairs that do not depend on one another."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise Refusal("wrong_type", "the conversation is text, and no JSON") from None
            self.rules["json_text"] = "the conversation was JSON within text"
        if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
            if len({len(column) for column in value.values()}) > 1:
                raise Refusal("wrong_type", "the columns of the conversation are not equally long")
            value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
            self.rules["columns"] = "the conversation was one list for each key"
        if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
            raise Refusal(
                "wrong_type", "a conversation is a list of turns: {from, value}, {role, content} or {user, assistant}"
            )
        turns: list[Said] = []
        pairs = 0
        for turn in value:
            found = {key: text for key, text in turn.items() if text is not None}
            self._nothing_else_shown(found, {*PAIR, *SPEAKER[0], *SPEAKER[1]})
            boxes = _boxes(found.get("boxes"))
            if set(PAIR) <= found.keys():
                pairs += 1
                asked, answered = (self._words(found[key], key) for key in PAIR)
                turns += [Said(HUMAN, asked, boxes), Said(GPT, answered)]
                continue
            speaker = next(((who, what) for who, what in SPEAKER if who in found or what in found), None)
            if speaker is None:
                raise Refusal("missing_key", f"a turn has no 'from' and 'value', but {', '.join(map(repr, turn)) or 'nothing'}")
            for key in speaker:
                if key not in found:
                    raise Refusal("missing_key", f"a turn has no {key!r}")
            turns.append(Said(self._role(found[speaker[0]]), self._words(found[speaker[1]], speaker[1]), boxes))
        return turns, bool(pairs) and 2 * pairs == len(turns)

    def _nothing_else_shown(self, members: dict[str, Any], known: set[str]) -> None:
        for key, value in members.items():
            if key not in known and (_holds_media(value, True) or (MEDIA_KEY.search(key) and _may_point(value, True))):
                raise Refusal("unread_media", f"a turn's {key!r} may be a picture, a video or a sound: {_short(value)}")

    def _role(self, name: Any) -> str:
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise Refusal("turns", f"a turn's role is one of {', '.join(ROLES)}, not {name!r}"[:200])
        if role != name:
            self.rules["roles"] = f"{name!r} was read as {role!r}"
        return role

    def _words(self, value: Any, key: str) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            self.rules["number"] = f"the number {value!r} was read as text"
            return str(value)
        if isinstance(value, list):
            self.rules["parts"] = "a turn was a list of parts"
            return "".join(map(self._part, value))
        raise Refusal("wrong_type", f"the {key!r} of a turn is text, not {type(value).__name__}")

    def _part(self, part: Any) -> str:
        if isinstance(part, str):
            return part
        found = {key: value for key, value in part.items() if not _nothing(value)} if isinstance(part, dict) else {}
        kind = str(found.get("type"))
        if kind == "text" and isinstance(found.get("text", ""), str):
            self._nothing_else_shown(found, {"type", "text"})
            return str(found.get("text", ""))
        if "image" not in kind:
            reason = "video" if "video" in kind else "wrong_type"
            raise Refusal(reason, f"a part of a turn is text or an image, not {kind!r}")
        shown = next((found[key] for key in ("image", "image_url", "url", "path") if key in found), None)
        if shown is not None:
            self.shown.append(_pointer(shown, kind))
        return MARK

    def _alternating(self, turns: list[Said]) -> list[Turn]:
        """Questions and answers, each question with its answer; the system text stands before the first question."""
        system = [self._words(self.raw["system"], "system")] if "system" in self.raw else []
        while turns and turns[0][0] == SYSTEM:
            system.append(turns.pop(0)[1])
        asked = bool(turns)
        while turns and turns[0][0] == GPT:
            self.rules["first_answer"] = f"left out, as no question stands before it: {turns.pop(0)[1][:60]!r}"
        while turns and turns[-1][0] == HUMAN:
            self.rules["last_question"] = f"left out, as it has no answer: {turns.pop()[1][:60]!r}"
        roles = [turn.role for turn in turns]
        if not roles or roles != [HUMAN, GPT] * (len(roles) // 2):
            shown = ", ".join(roles[:6]) or ("no question with its answer" if asked else "none")
            raise Refusal("turns", f"turns are human, gpt, human, gpt, ..., not {shown}")
        texts = [turn.text for turn in turns]
        if words := "\n".join(text.strip() for text in system if text.strip()):
            self.rules["system"] = f"put before the first question: {words[:60]!r}"
            texts[0] = f"{words}\n\n{texts[0]}"
        boxes = [turn.boxes for turn in turns[::2]]
        return [Turn(*said) for said in zip(texts[::2], texts[1::2], boxes, strict=True)]

    # --- pictures ---

    def _pictures(self) -> tuple[str | Held, ...]:
        named = [self._listed(key) for key in PICTURE if key in self.raw]
        if len(named) == 2 and (named[0] == named[1][:1] or named[0] == named[1]):
            named.pop(0)
        found = [*self.shown, *(one for some in named for one in some)]
        return tuple(one if isinstance(one, Held) or MEDIA_DATA.match(one) else self._path(one) for one in found)

    def _listed(self, key: str) -> list[str | Held]:
        value = self.raw[key]
        if isinstance(value, list):
            value = [one for one in value if not _nothing(one)]
            if len(value) == 1:
                self.rules["image_list"] = f"{key!r} was a list of one"
            return [_pointer(one, repr(key)) for one in value]
        return [_pointer(value, repr(key))]

    def _path(self, value: str) -> str:
        """Inside the folder by its spelling; links that the user has put there are followed."""
        path = PurePosixPath(_text(value, "'image'").removeprefix("file://"))
        roots = [] if self.folder is None or not path.is_absolute() else [self.folder.absolute(), self.folder.resolve()]
        for root in roots:
            if path.is_relative_to(root):
                self.rules["absolute_path"] = f"{str(path)!r} was read as relative to the image folder"
                path = path.relative_to(root)
                break
        if path.is_absolute() or ".." in path.parts:
            raise Refusal("image_path", f"{value!r} leads out of the image folder")
        return str(path)

    def _left_over(self, known: set[str], shown: bool) -> tuple[str, ...]:
        """The keys that are ignored. Raises Refusal if one of them may hold what a model would have to see or hear."""
        ignored = []
        for key, value in self.raw.items():
            if key in known:
                continue
            named = MEDIA_KEY.search(key)
            pointer = named is not None and named["pointer"] is not None
            if _holds_media(value, not shown) or (named and (not pointer or not shown) and _may_point(value, pointer)):
                what = "video" if VIDEO.search(f"{key} {_short(value)}") else "unread_media"
                raise Refusal(what, f"{key!r} may be a picture, a video or a sound, and is not read: {_short(value)}")
            ignored.append(key)
        return tuple(ignored)

    def _marked(self, turns: list[Turn], images: int, apart: bool) -> tuple[list[Turn], bool]:
        """As many marks as images, or none, all in questions; and whether each question is `apart` from the others."""
        for turn in turns:
            if mark := MEDIA_MARK.search(turn.question):
                what = "video" if VIDEO.search(mark[0]) else "image_marks"
                raise Refusal(what, f"a question holds {mark[0].strip()[:80]!r}, another code's mark of a medium")
        first = turns[0].question.count(MARK)
        asked = sum(turn.question.count(MARK) for turn in turns)
        answered = sum(turn.answer.count(MARK) for turn in turns)
        if apart and asked > first and (images == 1 or (images and asked != images)):
            self.rules["stray_marks"] = f"{asked - first} {MARK} beyond the first question were taken out"
            turns = [turns[0]] + [replace(turn, question=turn.question.replace(MARK, "").strip()) for turn in turns[1:]]
            asked = first
        if images and (asked, answered) == (0, 0):
            stand = "the image stands: it was" if images == 1 else f"the {images} images stand: they were"
            self.rules["image_first"] = f"no {MARK} said where {stand} put first"
        elif (asked, answered) != (images, 0):
            where = f"{asked} {MARK} in questions and {answered} in answers"
            raise Refusal(
                "image_marks", f"{where}, for {images or 'no'} image{'s' * (images > 1)}: one in a question for each, or none"
            )
        return turns, apart and asked == first

    def _within_limit(self, turns: list[Turn], apart: bool) -> list[list[Turn]]:
        """Whole turns of at most `max_text_chars`: of a conversation the first ones, of pairs several samples."""
        for turn in turns:
            if not turn.answer.strip():
                raise Refusal("empty_answer", "an answer is empty")
            if not turn.question.replace(MARK, "").strip():
                raise Refusal("empty_question", "a question is empty")
            _text(turn.question, "a question")
            _text(turn.answer, "an answer")
        most = self.limits.max_text_chars
        samples: list[list[Turn]] = []
        left = 0
        for turn in turns:
            chars = len(turn.question) + len(turn.answer)
            if chars > most and (apart or not samples):
                raise Refusal("too_long", f"a turn has {chars:,} characters, more than limits.max_text_chars = {most:,}")
            if not samples or chars > left:
                if samples and not apart:
                    kept = len(samples[0])
                    self.rules["cut_at_turn"] = f"{kept} of {len(turns)} turns are within limits.max_text_chars = {most:,}"
                    break
                samples.append([])
                left = most
            samples[-1].append(turn)
            left -= chars
        if len(samples) > 1:
            self.rules["several_samples"] = f"{len(turns)} questions became {len(samples)} samples"
        return samples


def _placed(turns: list[Turn], images: int, marked: bool) -> list[Turn]:
    """Images that nothing says the place of open the first question; a row's only one opens its question, as LLaVA has it."""
    if not images or (marked and images > 1):
        return turns
    its = next((index for index, turn in enumerate(turns) if MARK in turn.question), None) if marked else 0
    if its is None:
        return turns
    opened = replace(turns[its], question=f"{MARK}\n" * images + turns[its].question.replace(MARK, "").strip())
    return [*turns[:its], opened, *turns[its + 1 :]]


def _nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict | tuple) and not isinstance(value, Held) and not value)


def _pointer(value: Any, where: str) -> str | Held:
    """What says where a picture is: a path, a data URL, or a place."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("path", "url") if isinstance(value.get(key), str) and value[key]), value)
    if isinstance(value, str | Held):
        return value
    raise Refusal("wrong_type", f"{where} is the path of an image, not {type(value).__name__}")


def _holds_media(value: Any, strings: bool) -> bool:
    """Does it hold pictures' bytes or, where `strings` are looked at, something spelt like a media file or its content?"""
    if isinstance(value, Held | bytes):
        return True
    if isinstance(value, str):
        return strings and bool(MEDIA_DATA.match(value) or (len(value) < 1000 and MEDIA_FILE.search(value)))
    if isinstance(value, dict):
        return any(_holds_media(one, strings) for one in value.values())
    return isinstance(value, list) and any(_holds_media(one, strings) for one in value)


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


def _may_point(value: Any, pointer: bool) -> bool:
    """The value of a key that is named like a medium: text or a list; a number only where the key is its id."""
    return isinstance(value, str | list | dict) or (pointer and isinstance(value, int) and not isinstance(value, bool))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Refusal("wrong_type", f"{what} is text with something in it, not {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refusal("wrong_type", f"{what} holds half of a surrogate pair, which is no text") from None
    return value


def _short(value: Any) -> str:
    shown = value.name if isinstance(value, Held) else repr(value)
    return shown if len(shown) < 80 else f"{shown[:77]}..."
