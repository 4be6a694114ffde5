"""Validation and normalisation of rows in the formats of public data sets: the rules that JSON, JSONL, tar and Parquet files
share. docs/data.md has the table of rules; `Row.rules` names each rule that changed a row.

A row is text-only only if nothing in it can be an image, a video or audio; unknown media are refused, naming the key.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from components.config.data import DataLimits
from components.dataset.media import ANY_MARK, MEDIA_BASE64, MEDIA_DATA, MEDIA_MARK, VIDEO, Held, may_be_media
from components.dataset.shards import IMAGE as MARK
from components.dataset.shards import Box, Turn
from components.errors import Refusal

HUMAN, GPT, SYSTEM = "human", "gpt", "system"
ROLES = {"human": HUMAN, "user": HUMAN, "gpt": GPT, "assistant": GPT, "model": GPT, "system": SYSTEM, "developer": SYSTEM}
CONVERSATION = ("conversations", "messages", "texts")
PROMPT = ("prompt", "completion")  # two lists of turns, one after the other
SPEAKER = (("from", "value"), ("role", "content"))  # keys of a turn
PAIR = ("user", "assistant")  # keys of a turn of `texts`: independent question-answer pairs about an image
CALLS = ("tool_calls", "function_call")
MASK = re.compile(r"weight|(loss|train(ing|able)?)(_(mask|weight|scale))?")  # 0 or false: not to be learnt
PICTURE = ("image", "images")
INSTRUCTIONS = ("system", "system_prompt")
CAPTION = "txt"  # WebDataset's caption
DESCRIBE = "Describe the image."
Found = tuple[int, str, Any]  # number within the source, from 1; name for rows without an id; JSON, or the reader's Refusal

BOX_MARK = re.compile(r"<bbox>|<ref-object>")  # ms-swift's placeholders for entries of `objects`


class Said(NamedTuple):
    role: str
    text: str
    boxes: tuple[Box, ...] = ()


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
        return _Reading(raw, limits, folder).row(number)
    except RecursionError:
        raise Refusal("malformed_json", "a value is nested too deeply") from None


class _Reading:
    """Parser state of one row."""

    def __init__(self, raw: dict[str, Any], limits: DataLimits, folder: Path | None) -> None:
        self.raw = {key: value for key, value in raw.items() if not _nothing(value)}
        self.limits, self.folder = limits, folder
        self.rules: dict[str, str] = {}
        self.ignored: dict[str, None] = {}  # keys, in order
        self.shown: list[str | Held] = []  # images among the parts of turns
        self.places: list[Any] = []  # `index` within the row's images of the other parts
        self.led = ""  # system text that was put before a question
        self.dropped: list[Said] = []

    def row(self, number: int) -> Row:
        own = self._id()
        keys, conversation = self._conversation()
        turns, apart = self._turns(conversation) if keys else ([Said(HUMAN, DESCRIBE), Said(GPT, self._caption())], False)
        pictures = self._pictures()
        if not keys and not pictures:
            raise Refusal("missing_key", f"{CAPTION!r} is a caption, and no image is beside it")
        self._left_over({"id", "kind", *(keys or (CAPTION,)), *INSTRUCTIONS, *PICTURE}, pictures)
        said, apart = self._marked(self._alternating(turns), len(pictures), apart)
        pictures = pictures[: len(pictures) - sum(turn.text.count(MARK) for turn in self.dropped)]
        if len(pictures) != 1 and any(turn.boxes for turn in said):
            raise Refusal("boxes", f"'boxes' are regions of one image, and the row has {len(pictures) or 'none'}")
        marked = any(MARK in turn.question for turn in said)
        samples = tuple(
            tuple(self._placed(sample, len(pictures), marked and not index))
            for index, sample in enumerate(self._within_limit(said, apart))
        )
        pictures = pictures[: sum(turn.question.count(MARK) for turn in samples[0])]  # without those of cut turns
        kind = _text(self.raw.get("kind", "instruction" if pictures else "text"), "'kind'")
        return Row(number, own, kind, pictures, samples, self.rules, tuple(self.ignored))

    def _conversation(self) -> tuple[tuple[str, ...], Any]:
        """Keys of the conversation and their content; no key for a caption."""
        if key := next((key for key in CONVERSATION if key in self.raw), None):
            return (key,), self.raw[key]
        if all(isinstance(self.raw.get(key), list) for key in PROMPT):
            return PROMPT, [turn for key in PROMPT for turn in self.raw[key]]
        if CAPTION not in self.raw:
            has = ", ".join(map(repr, self.raw)) or "nothing"
            raise Refusal(
                "missing_key", f"there is no {', '.join(map(repr, CONVERSATION))}, or nothing in it; the row has {has}"[:400]
            )
        return (), None

    def _id(self) -> str | None:
        own = self.raw.get("id")
        if isinstance(own, float) and own.is_integer():
            own = int(own)
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
        """Turns, and whether all are independent question-answer pairs."""
        if isinstance(value, str):
            try:
                value = json.loads(value, object_pairs_hook=each_once)
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
            found = {key: text for key, text in turn.items() if not _null(text)}
            keys = next((keys for keys in (*SPEAKER, PAIR) if not found.keys().isdisjoint(keys)), None)
            if keys is None:
                raise Refusal(
                    "missing_key", f"a turn has no 'from' and 'value', but {', '.join(map(repr, found)) or 'nothing'}"
                )
            for key in keys:
                if key not in found:
                    raise Refusal("missing_key", f"a turn has no {key!r}, or null in it")
            role = GPT if keys == PAIR else self._role(found[keys[0]])
            instructions = INSTRUCTIONS if keys == PAIR else ()
            self._nothing_else(found, (*keys, *instructions, "boxes"), learnt=role == GPT)
            boxes = _boxes(found.get("boxes"))
            if keys == PAIR:
                pairs += 1
                asked, answered = (self._words(found[key], key) for key in PAIR)
                asked = self._instructed([self._words(found[key], key) for key in instructions if key in found], asked)
                turns += [Said(HUMAN, asked, boxes), Said(GPT, answered)]
            else:
                turns.append(Said(role, self._words(found[keys[1]], keys[1]), boxes))
        return turns, bool(pairs) and 2 * pairs == len(turns)

    def _nothing_else(self, members: dict[str, Any], known: tuple[str, ...], learnt: bool = False) -> None:
        """Refuse media, other words, calls and loss masks (if `learnt`) in keys not `known`; record the rest as ignored."""
        read = [_alias(members[key]) for key in known if key in members]
        for key, value in members.items():
            if key in known or _nothing(value):
                continue
            if may_be_media(key, value):
                raise Refusal("unread_media", f"a turn's {key!r} may be a picture, a video or a sound: {_short(value)}")
            if key in (*SPEAKER[0], *SPEAKER[1], *PAIR) and _alias(value) not in read:
                raise Refusal("turns", f"a turn says two things: {key!r} is {_short(value)}, beside {known[0]!r}")
            if key in CALLS or (learnt and _unlearnt(key, value)):
                raise Refusal(
                    "turns", f"a turn's {key!r} is {_short(value)}, which is not read: it would be trained on as it stands"
                )
            self.ignored[f"{key} of a turn"] = None

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
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            self.rules["number"] = f"the number {value!r} was read as text"
            return str(value)
        if isinstance(value, list):
            self.rules["parts"] = "a turn was a list of parts"
            said = ""
            for part in map(self._part, value):
                apart = said.endswith(MARK) or part.startswith(MARK) or said[-1:].isspace() or part[:1].isspace()
                said += part if apart or not said else f"\n{part}"
            return said
        raise Refusal("wrong_type", f"the {key!r} of a turn is text, not {type(value).__name__}")

    def _part(self, part: Any) -> str:
        if isinstance(part, str):
            return part
        found = {key: value for key, value in part.items() if not _nothing(value)} if isinstance(part, dict) else {}
        kind = str(found.get("type") or next(iter(found), None))
        if kind.endswith("text") and isinstance(found.get("text", None if found.keys() - {"type"} else ""), str):
            self._nothing_else(found, ("type", "text"))
            return str(found.get("text", ""))
        if "image" not in kind:
            reason = "video" if "video" in kind else "wrong_type"
            raise Refusal(reason, f"a part of a turn is text or an image, not {kind!r}: {_short(found)}")
        key = next((key for key in ("image", "image_url", "url", "path") if key in found), None)
        if key is None:
            self._nothing_else(found, ("type", "index"))
            self.places.append(found.get("index"))
        else:
            self.shown.append(_pointer(found[key], repr(key)))
        return MARK

    def _alternating(self, turns: list[Said]) -> list[Turn]:
        """Question-answer turns; the system text is prepended to the first question."""
        system = [self._words(self.raw[key], key) for key in INSTRUCTIONS if key in self.raw]
        while turns and turns[0].role == SYSTEM:
            system.append(turns.pop(0).text)
        while turns and turns[0].role == GPT:
            self.rules["first_answer"] = f"left out, as no question stands before it: {turns[0].text[:60]!r}"
            self.dropped.append(turns.pop(0))
        while turns and turns[-1].role == HUMAN:
            self.rules["last_question"] = f"left out, as it has no answer: {turns[-1].text[:60]!r}"
            self.dropped.append(turns.pop())
        roles = [turn.role for turn in turns]
        if not roles:
            raise Refusal("turns", "there is no question with its answer")
        if roles != [HUMAN, GPT] * (len(roles) // 2):
            raise Refusal("turns", f"turns are human, gpt, human, gpt, ..., not {', '.join(roles[:6])}")
        texts = [turn.text for turn in turns]
        texts[0] = self._instructed(system, texts[0])
        boxes = [turn.boxes for turn in turns[::2]]
        return [Turn(*said) for said in zip(texts[::2], texts[1::2], boxes, strict=True)]

    def _instructed(self, system: list[str], question: str) -> str:
        """Question after the system texts; an empty one stays empty."""
        words = "\n".join(dict.fromkeys(text.strip() for text in system if text.strip()))
        if not words or not question.replace(MARK, "").strip():
            return question
        self.rules["system"] = f"put before a question: {words[:60]!r}"
        self.led = f"{words}\n\n"
        return f"{self.led}{question}"

    # --- pictures ---

    def _pictures(self) -> tuple[str | Held, ...]:
        """Images in the order of their marks: those of the parts, and those of the keys that are not the same ones again."""
        found: list[str | Held] = []
        for some in (self.shown, *(self._listed(key) for key in PICTURE if key in self.raw)):
            some = [one if isinstance(one, Held) or MEDIA_DATA.match(one) else self._path(one) for one in some]
            if len(some) > len(found) and all(one in some for one in found):
                found = some
            elif not all(one in found for one in some):
                found = [*found, *some]
        if all(place is None for place in self.places):
            return tuple(found)
        chosen = [found[int(place)] for place in self.places if place in range(len(found))]
        if len(chosen) < len(self.places) or not all(one in chosen for one in found):
            raise Refusal("image_marks", f"the parts' 'index' is {self.places}, for {len(found)} images: which is meant?"[:200])
        return tuple(chosen)

    def _listed(self, key: str) -> list[str | Held]:
        value = self.raw[key]
        listed = [one for one in value if not _nothing(one)] if isinstance(value, list) else [value]
        if isinstance(value, list) and 0 < len(listed) < len(value):
            self.rules["null_image"] = f"{key!r} holds null beside {len(listed)} image{'s' * (len(listed) > 1)}"
        elif isinstance(value, list) and len(listed) == 1:
            self.rules["image_list"] = f"{key!r} was a list of one"
        return [_pointer(one, repr(key)) for one in listed]

    def _path(self, value: str) -> str:
        """Path relative to the image folder, checked by its spelling: symbolic links in the folder are followed."""
        value = _text(value, "'image'").removeprefix("file://")
        if "://" in value:
            raise Refusal(
                "missing_file", f"{_short(value)} is an address, and nothing is fetched: name a file of the image folder"
            )
        path = PurePosixPath(value)
        roots = [] if self.folder is None or not path.is_absolute() else [self.folder.absolute(), self.folder.resolve()]
        for root in roots:
            if path.is_relative_to(root):
                self.rules["absolute_path"] = f"{str(path)!r} was read as relative to the image folder"
                path = path.relative_to(root)
                break
        if path.is_absolute() or ".." in path.parts:
            raise Refusal("image_path", f"{_short(value)} leads out of the image folder")
        return str(path)

    def _left_over(self, known: set[str], shown: tuple[str | Held, ...]) -> None:
        """Record the keys that no rule reads. `shown`: images read. Raises Refusal if one may hold other media."""
        for key, value in self.raw.items():
            if key in known:
                continue
            if may_be_media(key, value, shown):
                what = "video" if VIDEO.search(f"{key} {_short(value)}") else "unread_media"
                raise Refusal(what, f"{key!r} may be a picture, a video or a sound, and is not read: {_short(value)}")
            if _unlearnt(key, value) or (key == "label" and value is False):
                raise Refusal("turns", f"{key!r} is {_short(value)}: the row is not to be trained on as it stands")
            self.ignored[key] = None

    def _marked(self, turns: list[Turn], images: int, apart: bool) -> tuple[list[Turn], bool]:
        """Turns with one mark per image or none, all in questions, and whether they still are independent (`apart`)."""
        marks = MEDIA_MARK if not images or any(MARK in turn.question for turn in turns) else ANY_MARK
        for turn in turns:
            if mark := marks.search(turn.question):
                what = "video" if VIDEO.search(mark[0]) else "image_marks"
                raise Refusal(what, f"a question holds {mark[0].strip()[:80]!r}, another code's mark of a medium")
            if "objects" in self.raw and (mark := BOX_MARK.search(turn.question + turn.answer)):
                raise Refusal("boxes", f"{mark[0]} stands for what 'objects' holds, which is not read")
        first = turns[0].question.count(MARK)
        dropped = {role: sum(turn.text.count(MARK) for turn in self.dropped if turn.role == role) for role in (HUMAN, GPT)}
        asked = dropped[HUMAN] + sum(turn.question.count(MARK) for turn in turns)
        answered = dropped[GPT] + sum(turn.answer.count(MARK) for turn in turns)
        if apart and asked > first and (images == 1 or (images and asked != images)):
            self.rules["stray_marks"] = f"{asked - first} {MARK} beyond the first question were taken out"
            turns = [turns[0]] + [replace(turn, question=turn.question.replace(MARK, "").strip()) for turn in turns[1:]]
            asked = first
        if images and (asked, answered) == (0, 0):
            if null := self.rules.get("null_image"):
                raise Refusal("image_marks", f"{null}, and no {MARK} says which is meant")
            stand = "the image stands: it was" if images == 1 else f"the {images} images stand: they were"
            self.rules["image_first"] = f"no {MARK} said where {stand} put first"
        elif (asked, answered) != (images, 0):
            where = f"{asked} {MARK} in questions and {answered} in answers"
            raise Refusal(
                "image_marks", f"{where}, for {images or 'no'} image{'s' * (images > 1)}: one in a question for each, or none"
            )
        return turns, apart and asked == first

    def _placed(self, turns: list[Turn], images: int, marked: bool) -> list[Turn]:
        """Turns with image marks: unmarked images open the first question, a single image opens its question, as in LLaVA."""
        if not images or (marked and images > 1):
            return turns
        its = next((index for index, turn in enumerate(turns) if MARK in turn.question), None) if marked else 0
        if its is None:
            return turns
        question = turns[its].question
        if marked and question.removeprefix(self.led).partition(MARK)[0].strip():
            self.rules["image_moved"] = f"the only {MARK} was put before its question: {question[:60]!r}"
        words = re.sub(rf"(?<=\S){MARK}(?=\S)", " ", question).replace(MARK, "").strip()
        opened = replace(turns[its], question=f"{MARK}\n" * images + words)
        return [*turns[:its], opened, *turns[its + 1 :]]

    def _within_limit(self, turns: list[Turn], apart: bool) -> list[list[Turn]]:
        """Whole turns of at most `max_text_chars`: a conversation is cut, independent pairs become several samples."""
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


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object. Raises Refusal malformed_json for a duplicate key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Refusal("malformed_json", f"the key {twice[:60]!r} stands twice in one object")
    return found


def _null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _nothing(value: Any) -> bool:
    """Null, or empty, as {bytes: null, path: null} is."""
    if isinstance(value, dict):
        return all(map(_nothing, value.values()))
    return _null(value) or (isinstance(value, str | list | tuple) and not value)


def _alias(value: Any) -> str:
    """Words, or a role as all dialects name it."""
    return ROLES.get(str(value).lower(), str(value))


def _unlearnt(key: str, value: Any) -> bool:
    """Mask of training: whether a key keeps what it belongs to from it."""
    return isinstance(value, int | float) and not value and MASK.fullmatch(key) is not None


def _pointer(value: Any, where: str) -> str | Held:
    """Reference to an image: a path, a data URL, or a place. Base64 content becomes a data URL."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "path", "url") if isinstance(value.get(key), str) and value[key]), value)
    if isinstance(value, str) and MEDIA_BASE64.match(value):
        return f"data:image/*;base64,{value}"
    if isinstance(value, str | Held):
        return value
    raise Refusal("wrong_type", f"{where} is the path of an image, not {type(value).__name__}")


def _boxes(value: Any) -> tuple[Box, ...]:
    """Boxes `[[left, top, right, bottom], ...]`, in shares of the upright image's width and height."""
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
