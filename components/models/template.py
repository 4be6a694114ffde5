"""Chat templates: the paper's Vicuna style (docs/method.md, "Recipe of the paper"), or the checkpoint's own.

{system }USER: <image>\\n{q} ASSISTANT: {a}<|endoftext|>USER: {q} ASSISTANT: {a}<|endoftext|>
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from components.dataset.shards import Turn
from components.errors import ModelError

if TYPE_CHECKING:
    from components.config.models import Template as TemplateSettings

IMAGE = "<image>"  # how data sets mark the image's place; the template itself always puts the image first, as LLaVA does
EOS = "<|endoftext|>"
USER, ASSISTANT = "USER:", "ASSISTANT:"


class Part(NamedTuple):
    text: str
    own: bool  # the template's words, in which special tokens are special; else the data's, which are plain text
    response: bool = False  # text of an answer, from the space before it to its EOS, included


@dataclass(frozen=True)
class Rendered:
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    @property
    def response_spans(self) -> tuple[tuple[int, int], ...]:
        """`text[a:b]` for each of them is an answer with its EOS."""
        spans, at, start = [], 0, None
        for part in (*self.parts, Part("", own=True)):
            if part.response and start is None:
                start = at
            elif not part.response and start is not None:
                spans.append((start, at))
                start = None
            at += len(part.text)
        return tuple(spans)

    @property
    def question_spans(self) -> tuple[tuple[int, int], ...]:
        """`text[a:b]` for each of them is a question, without anything of the template's own."""
        ends = accumulate(len(part.text) for part in self.parts)
        asked = ((end, part) for end, part in zip(ends, self.parts, strict=True) if not (part.own or part.response))
        return tuple((end - len(part.text), end) for end, part in asked)


@dataclass(frozen=True)
class Template:
    """`system` stands before the first turn; may be empty. `eos` ends every answer.

    `style` processor: of whatever processor it is used with (`of`), it is that one's own template.
    """

    system: str
    eos: str = EOS
    style: Literal["vicuna", "processor"] = "vicuna"
    wants_special_tokens = True  # the tokenizer's own at the start, where it adds any

    @classmethod
    def asked(cls, settings: TemplateSettings) -> Template:
        return cls(settings.system, style=settings.style)

    @property
    def identity(self) -> str:
        """Of two settings that render the same, the same; the checkpoint's own template is the checkpoint's affair."""
        return self.jinja if self.style == "vicuna" else f"processor\n{self.system}"

    def of(self, processor: Any) -> Template | ChatTemplate:
        """As it is for this processor, tried on up to three turns. Raises ModelError as `ChatTemplate` and `_try` do."""
        if self.style == "processor":
            made: Template | ChatTemplate = ChatTemplate(self.system, processor)
        else:
            made = replace(self, eos=processor.tokenizer.eos_token)
        _try(made, processor)
        return made

    def render(self, turns: Sequence[Turn], image_text: str | None, answer: bool = True) -> Rendered:
        """All `turns`; the first one alone, up to `ASSISTANT:`, if not `answer`. Answers are stripped of white space.

        `image_text` is what stands for the image (the image token, once per visual token); None for text-only samples.
        The space before an answer belongs to the answer: tokenizers join it to the first word, and a prompt ends without it.
        """
        parts = [Part(f"{self.system} " if self.system else "", own=True)]
        for index, turn in enumerate(turns if answer else turns[:1]):
            image = f"{image_text}\n" if image_text is not None and index == 0 else ""
            parts += [Part(f"{USER} {image}", own=True), Part(question_of(turn), own=False), Part(f" {ASSISTANT}", own=True)]
            if answer:
                parts += [Part(f" {turn.answer.strip()}", own=False, response=True), Part(self.eos, own=True, response=True)]
        return Rendered(tuple(parts))

    @property
    def jinja(self) -> str:
        """The same template for `processor.apply_chat_template`: what serving and evaluation kits read."""
        system = f"{self.system} ".replace("\\", "\\\\").replace("'", "\\'") if self.system else ""
        return (
            f"{{{{ '{system}' }}}}"
            "{% for message in messages %}"
            "{% if message['content'] is string %}{% set text = message['content'] %}{% set image = '' %}"
            "{% else %}"
            "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
            f"{{% set image = '{IMAGE}\\n' if message['content'] | selectattr('type', 'equalto', 'image') | list else '' %}}"
            "{% endif %}"
            f"{{% if message['role'] == 'user' %}}{{{{ '{USER} ' + image + text + ' {ASSISTANT}' }}}}"
            f"{{% elif message['role'] == 'assistant' %}}{{{{ ' ' + text + '{self.eos}' }}}}"
            "{% endif %}{% endfor %}"
        )


class ChatTemplate:
    """The processor's own chat template, asked once per number of turns for what it writes around questions and answers.

    An answer stands right after the words that a prompt ends with, and ends with the first special token after it: whatever
    the template writes between them for an answer that is there already (Qwen3's empty thoughts, another space) is left out,
    as a model that answers does not write it.

    Raises ModelError if there is no template, if it has no place for an image, if it ends an answer without a special token
    (a model trained so never learns to stop), or if it writes turns otherwise than one after another.
    """

    def __init__(self, system: str, processor: Any) -> None:
        self.system = system
        self._tokenizer = processor.tokenizer
        self._image_token = processor.image_token
        self._name = processor.tokenizer.name_or_path
        self.jinja: str = processor.chat_template or processor.tokenizer.chat_template or ""
        if not self.jinja:
            raise ModelError(f"{self._name}: neither processor nor tokenizer has a chat template; set template.style: vicuna")
        if "".join(self._around(1, True, 0)).count(self._image_token) != 1:
            raise ModelError(
                f"{self._name}: its chat template has no place for an image ({self._image_token!r}); set template.style: vicuna"
            )
        tail = self._around(1, False, 1)[-1]
        self.eos = self._end(tail)
        self._tail = tail[: tail.index(self.eos) + len(self.eos)]
        bos = self._tokenizer.bos_token
        self.wants_special_tokens = not (bos and self._around(1, False, 0)[0].startswith(bos))
        self._frames: dict[tuple[int, bool], list[Part | int]] = {}

    def render(self, turns: Sequence[Turn], image_text: str | None, answer: bool = True) -> Rendered:
        """As `Template.render`."""
        shown = image_text is not None
        texts = [text for turn in turns for text in (question_of(turn), turn.answer.strip())]
        parts = []
        for piece in self._frame(len(turns) if answer else 0, shown):
            if isinstance(piece, int):
                parts.append(Part(texts[piece], own=False, response=piece % 2 == 1))
            elif shown and self._image_token in piece.text:
                assert image_text is not None
                parts.append(piece._replace(text=piece.text.replace(self._image_token, image_text, 1)))
            else:
                parts.append(piece)
        return Rendered(tuple(parts))

    def _frame(self, turns: int, shown: bool) -> list[Part | int]:
        """The template's words around so many turns, 2k for question k and 2k + 1 for its answer between them; 0: a prompt."""
        if (turns, shown) not in self._frames:
            self._frames[turns, shown] = self._framed(turns, shown) if turns else self._prompt(shown)
        return self._frames[turns, shown]

    def _prompt(self, shown: bool) -> list[Part | int]:
        before, after = self._around(1, shown, 0)
        return [Part(before, own=True), 0, Part(after, own=True)]

    def _framed(self, turns: int, shown: bool) -> list[Part | int]:
        around = self._around(turns, shown, turns)
        first, asks = self._around(1, shown, 0)
        heads = [asks] if turns == 1 else [asks, self._around(2, shown, 1)[-1]]
        frame: list[Part | int] = [Part(first, own=True)]
        for index in range(turns):
            head, before, after = heads[min(index, 1)], around[2 * index + 1], around[2 * index + 2]
            lead = before.removeprefix(head) if before.startswith(head) else ""
            end = len(self._tail)
            if around[0] != first or not after.startswith(self._tail):
                raise ModelError(
                    f"{self._name}: its chat template writes a turn differently once another follows, so that where answers"
                    " stand is not known; set template.style: vicuna"
                )
            frame += [2 * index, Part(head, own=True), Part("" if lead.strip() else lead, own=True, response=True)]
            frame += [2 * index + 1, Part(after[:end], own=True, response=True), Part(after[end:], own=True)]
        return frame

    def _around(self, turns: int, image: bool, answers: int) -> list[str]:
        """What the template writes before, between and after questions and answers; without the last answer, up to where it
        begins. Nothing of the data is shown to the template, so that no text of theirs changes what it writes."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        for index in range(turns):
            shown = [{"type": "image"}] if image and index == 0 else []
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": _slot(2 * index)}]})
            if index < answers:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": _slot(2 * index + 1)}]})
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self.jinja, tokenize=False, add_generation_prompt=answers < turns
            )
        except Exception as error:  # it is a program of somebody's, which may raise anything
            raise ModelError(
                f"{self._name}: its chat template refuses these turns: {error}; set template.style: vicuna"
            ) from None
        pieces = SLOT.split(text)
        if [int(slot) for slot in pieces[1::2]] != list(range(turns + answers)):
            raise ModelError(
                f"{self._name}: its chat template leaves out, repeats or reorders turns; set template.style: vicuna"
            )
        return pieces[::2]

    def _end(self, tail: str) -> str:
        """The special token that ends an answer."""
        found = [(tail.find(token), token) for token in special_tokens(self._tokenizer) if token in tail]
        if not found:
            raise ModelError(
                f"{self._name}: its chat template ends an answer without a special token, and a model trained so never learns"
                " to stop; set template.style: vicuna"
            )
        return min(found)[1]


SLOT = re.compile("\ue000([0-9]+)\ue001")  # private characters: no template writes them


def _slot(number: int) -> str:
    return f"\ue000{number}\ue001"


def _try(template: Template | ChatTemplate, processor: Any) -> None:
    """Raises ModelError if a prompt's tokens are not those that its training sample begins with, or if what is trained on are
    not the answers and one end each."""
    tokenizer = processor.tokenizer
    for count in (1, 2, 3):
        for image in (None, processor.image_token):
            turns = [Turn("What?", "This"), Turn("And?", "That"), Turn("Why?", "So")][:count]
            prompt, whole = (template.render(turns, image, answer) for answer in (False, True))
            special = template.wants_special_tokens
            asked = tokenizer(prompt.text, add_special_tokens=special).input_ids
            said = tokenizer(whole.text, add_special_tokens=special, return_offsets_mapping=True)
            eos = tokenizer.convert_tokens_to_ids(template.eos)
            for start, end in whole.response_spans:
                trained = [i for i, (a, b) in zip(said.input_ids, said.offset_mapping, strict=True) if a < end and b > start]
                if trained.count(eos) != 1 or trained[-1] != eos:
                    raise ModelError(
                        f"{tokenizer.name_or_path}: an answer is to end with {template.eos!r} once; its tokens are"
                        f" {tokenizer.convert_ids_to_tokens(trained)}"
                    )
            if said.input_ids[: len(asked)] != asked:
                raise ModelError(
                    f"{tokenizer.name_or_path}: the tokens of a prompt, {tokenizer.convert_ids_to_tokens(asked)[-4:]}, are not"
                    " those that its training sample begins with; set another template.style"
                )


def question_of(turn: Turn) -> str:
    """The question without the mark of the image's place."""
    return turn.question.replace(IMAGE, "").strip()


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Those with a name (EOS, ...) and those without, such as the marks of a turn."""
    marked = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *marked]))
