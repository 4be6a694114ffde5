"""Turns of a conversation in the dialects of public data sets: keys, roles, lists of parts, boxes, system text."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from components.dataset.changes import Changes, is_unlearnt
from components.dataset.image_refs import pointer
from components.dataset.json_values import each_once, is_empty, is_null, short, whole_number
from components.dataset.media import Held, may_be_media
from components.dataset.shards import IMAGE as MARK
from components.dataset.shards import Box, Turn
from components.errors import Refusal

HUMAN, GPT, SYSTEM = "human", "gpt", "system"
ROLES = {"human": HUMAN, "user": HUMAN, "gpt": GPT, "assistant": GPT, "model": GPT, "system": SYSTEM, "developer": SYSTEM}
SPEAKER = (("from", "value"), ("role", "content"))  # keys of a turn
PAIR = ("user", "assistant")  # keys of a turn of `texts`: independent question-answer pairs about an image
TURN = " or ".join(f"{{{', '.join(keys)}}}" for keys in (*SPEAKER, PAIR))
INSTRUCTIONS = ("system", "system_prompt")
CALLS = ("tool_calls", "function_call")


class Message(NamedTuple):
    role: str
    text: str
    boxes: tuple[Box, ...] = ()


class TurnReader:
    """Reader of one conversation. Raises Refusal."""

    def __init__(self, changes: Changes) -> None:
        self.changes = changes
        self.rules = changes.rules
        self.marks: list[str | Held | None] = []  # image of each mark, in order; None: one of the row's
        self.places: list[Any] = []  # `index` within the row's images of the parts without an image
        self.dropped: list[Message] = []

    def read(self, value: Any) -> tuple[list[Message], bool]:
        """Turns, and whether all are independent question-answer pairs."""
        turns: list[Message] = []
        pairs = 0
        for turn in self._listed(value):
            members = {key: text for key, text in turn.items() if not is_null(text)}
            keys = next((keys for keys in (*SPEAKER, PAIR) if not members.keys().isdisjoint(keys)), None)
            if keys is None:
                raise Refusal("missing_key", f"a turn is {TURN}, and one has {', '.join(map(repr, members)) or 'nothing'}")
            for key in keys:
                if key not in members:
                    raise Refusal("missing_key", f"a turn has no {key!r}, or null in it")
            role = GPT if keys == PAIR else self._role(members[keys[0]])
            instructions = INSTRUCTIONS if keys == PAIR else ()
            self._check_unread(members, (*keys, *instructions, "boxes"), learnt=role == GPT)
            boxes = _boxes(members.get("boxes"))
            if keys == PAIR:
                pairs += 1
                question, answer = (self.text(members[key], key) for key in PAIR)
                question = self._instructed([self.text(members[key], key) for key in instructions if key in members], question)
                turns += [Message(HUMAN, question, boxes), Message(GPT, answer)]
            else:
                turns.append(Message(role, self.text(members[keys[1]], keys[1]), boxes))
        return turns, bool(pairs) and 2 * pairs == len(turns)

    def _listed(self, value: Any) -> list[dict[str, Any]]:
        if isinstance(value, str):
            try:
                value = json.loads(value, object_pairs_hook=each_once, parse_int=whole_number)
            except (ValueError, RecursionError):
                raise Refusal("wrong_type", "the conversation is text, and no JSON") from None
            self.rules["json_text"] = "the conversation was JSON within text"
        if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
            if len({len(column) for column in value.values()}) > 1:
                raise Refusal("wrong_type", "the columns of the conversation are not equally long")
            value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
            self.rules["columns"] = "the conversation was one list for each key"
        if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
            raise Refusal("wrong_type", f"a conversation is a list of turns: {TURN}")
        return value

    def _check_unread(self, members: dict[str, Any], known: tuple[str, ...], learnt: bool = False) -> None:
        """Refuse media, other words, calls and loss masks (if `learnt`) in keys not `known`; record the rest as ignored."""
        read = [_alias(members[key]) for key in known if key in members]
        for key, value in members.items():
            if key in known or is_empty(value):
                continue
            if may_be_media(key, value):
                raise Refusal("unread_media", f"a turn's {key!r} may be a picture, a video or a sound: {short(value)}")
            if key in (*SPEAKER[0], *SPEAKER[1], *PAIR) and _alias(value) not in read:
                raise Refusal("turns", f"a turn says two things: {key!r} is {short(value)}, beside {known[0]!r}")
            if key in CALLS or (learnt and is_unlearnt(key, value)):
                raise Refusal(
                    "turns", f"a turn's {key!r} is {short(value)}, which is not read: it would be trained on as it stands"
                )
            self.changes.ignored[f"{key} of a turn"] = None

    def _role(self, name: Any) -> str:
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise Refusal("turns", f"a turn's role is one of {', '.join(ROLES)}, not {name!r}")
        if role != name:
            self.rules["roles"] = f"{name!r} was read as {role!r}"
        return role

    def text(self, value: Any, key: str) -> str:
        """Text of a string, a number or a list of parts, each image a mark."""
        if isinstance(value, str):
            return self._marked(value)
        if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
            self.rules["number"] = f"the number {value!r} was read as text"
            return str(value)
        if isinstance(value, list):
            if len(value) > 1 and all(isinstance(part, str) for part in value):  # as VQA sets list what several people said
                raise Refusal("turns", f"a turn is one text, not a list of {len(value)}: {', '.join(map(short, value[:3]))}")
            self.rules["parts"] = "a turn was a list of parts"
            text = ""
            for part in map(self._part, value):
                apart = text.endswith(MARK) or part.startswith(MARK) or text[-1:].isspace() or part[:1].isspace()
                text += part if apart or not text else f"\n{part}"
            return text
        raise Refusal("wrong_type", f"the {key!r} of a turn is text, not {type(value).__name__}")

    def _part(self, part: Any) -> str:
        if isinstance(part, str):
            return self._marked(part)
        if not isinstance(part, dict):
            raise Refusal("wrong_type", f"a part of a turn is text or an image, not {short(part)}")
        members = {key: value for key, value in part.items() if not is_empty(value)}
        kind = str(members.get("type") or next(iter(members), None))
        if kind.endswith("text") and isinstance(members.get("text", None if members.keys() - {"type"} else ""), str):
            self._check_unread(members, ("type", "text"))
            return self._marked(str(members.get("text", "")))
        if "image" not in kind:
            reason = "video" if "video" in kind else "wrong_type"
            raise Refusal(reason, f"a part of a turn is text or an image, not {kind!r}: {short(members)}")
        key = next((key for key in ("image", "image_url", "url", "path") if key in members), None)
        if key is None:
            self._check_unread(members, ("type", "index"))
            self.places.append(members.get("index"))
        self.marks.append(None if key is None else pointer(members[key], repr(key)))
        return MARK

    def _marked(self, text: str) -> str:
        self.marks += [None] * text.count(MARK)
        return text

    def alternating(self, turns: list[Message], system: list[str]) -> list[Turn]:
        """Question-answer turns; `system` and the conversation's own system text open the first question."""
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
        return [Turn(*turn) for turn in zip(texts[::2], texts[1::2], boxes, strict=True)]

    def dropped_marks(self, role: str) -> int:
        """Image marks in turns that `alternating` left out."""
        return sum(turn.text.count(MARK) for turn in self.dropped if turn.role == role)

    def _instructed(self, system: list[str], question: str) -> str:
        """Question after the system texts; an empty one stays empty."""
        system_text = "\n".join(dict.fromkeys(text.strip() for text in system if text.strip()))
        if not system_text or not question.replace(MARK, "").strip():
            return question
        self.rules["system"] = f"put before a question: {system_text[:60]!r}"
        self.changes.system = f"{system_text}\n\n"
        return f"{self.changes.system}{question}"


def _alias(value: Any) -> str:
    """Words, or a role as all dialects name it."""
    return ROLES.get(str(value).lower(), str(value))


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
