"""Chat templates: the paper's Vicuna style (docs/method.md, "Recipe of the paper"), or the checkpoint's own.

{system }USER: <image>\\n{q} ASSISTANT: {a}<|endoftext|>USER: {q} ASSISTANT: {a}<|endoftext|>
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from components.dataset.shards import IMAGE as IMAGE
from components.dataset.shards import Turn
from components.errors import ModelError

if TYPE_CHECKING:
    from components.config.models import Template as TemplateSettings

EOS = "<|endoftext|>"
USER, ASSISTANT = "USER:", "ASSISTANT:"
# Fixed date for templates that write today's: the same text on every day of training and after. Llama 3's default.
ONE_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


Shape = tuple[str, ...]  # images and texts of each question in order: "it", "iit", "tit", "t", ...


class Part(NamedTuple):
    text: str
    own: bool  # template text, with special tokens; else text of the data, which is plain
    response: bool = False  # text of an answer, from the space before it to its EOS, inclusive
    image: bool = False  # placeholder of an image


@dataclass(frozen=True)
class Rendered:
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    @property
    def response_spans(self) -> tuple[tuple[int, int], ...]:
        """Spans of the answers in `text`, each with its EOS."""
        return self._spans(lambda part: part.response)

    @property
    def question_spans(self) -> tuple[tuple[int, int], ...]:
        """Spans of the questions' texts in `text`, without template text."""
        return self._spans(lambda part: not (part.own or part.response))

    @property
    def image_spans(self) -> tuple[tuple[int, int], ...]:
        """Spans of the image placeholders in `text`."""
        return self._spans(lambda part: part.image)

    def _spans(self, wanted: Callable[[Part], bool]) -> tuple[tuple[int, int], ...]:
        """Spans of the runs of adjacent wanted parts. Template text, perhaps empty, parts any two questions or images."""
        spans, end = [], 0
        for is_wanted, run in groupby(self.parts, wanted):
            start, end = end, end + sum(len(part.text) for part in run)
            if is_wanted:
                spans.append((start, end))
        return tuple(spans)


@dataclass(frozen=True)
class Template:
    """Settings of a chat template: `system` text before the first turn, may be empty; `eos` ends every answer.

    `style` processor: the own template of the processor that `of` is called with.
    """

    system: str
    eos: str = EOS
    style: Literal["vicuna", "processor"] = "vicuna"
    wants_special_tokens = True  # leading special tokens of the tokenizer (BOS), if it adds any

    @classmethod
    def asked(cls, settings: TemplateSettings) -> Template:
        return cls(settings.system, style=settings.style)

    @property
    def identity(self) -> str:
        """Key that is equal for settings of equal rendering; a checkpoint's own template is not part of it."""
        return self.jinja if self.style == "vicuna" else f"processor\n{self.system}"

    def of(self, processor: Any) -> Template | ChatTemplate:
        """Template bound to a processor, tried on up to three turns. Raises ModelError as `ChatTemplate` and `_try` do."""
        if self.style == "processor":
            made: Template | ChatTemplate = ChatTemplate(self.system, processor)
        else:
            made = replace(self, eos=processor.tokenizer.eos_token)
        _try(made, processor)
        return made

    def render(self, turns: Sequence[Turn], images: Sequence[str], answer: bool = True) -> Rendered:
        """Text of all `turns`; of the first one up to `ASSISTANT:`, if not `answer`. Answers are stripped of white space.

        `images`: placeholder of each image (the image token, once per visual token), in the order of their marks; a newline
        follows those that open a question.
        The space before an answer is part of it: tokenizers join it to the first word, and a prompt ends without it.
        """
        parts, shown = [Part(f"{self.system} " if self.system else "", own=True)], iter(images)
        for turn in turns if answer else turns[:1]:
            parts.append(Part(f"{USER} ", own=True))
            asked = pieces(turn.question)
            opening = asked.index(next(filter(None, asked), ""))
            for index, piece in enumerate(asked):
                if piece is None:
                    parts += [Part(next(shown), own=True, image=True), Part("\n" * (index < opening), own=True)]
                else:
                    parts.append(Part(piece, own=False))
            parts.append(Part(f" {ASSISTANT}", own=True))
            if answer:
                parts += [Part(f" {turn.answer.strip()}", own=False, response=True), Part(self.eos, own=True, response=True)]
        return Rendered(tuple(parts))

    @property
    def jinja(self) -> str:
        """Jinja form of the template for `processor.apply_chat_template`, as serving and evaluation kits use it."""
        system = f"{self.system} ".replace("\\", "\\\\").replace("'", "\\'") if self.system else ""
        return (
            f"{{{{ '{system}' }}}}"
            "{% for message in messages %}"
            "{% if message['content'] is string %}{% set text = message['content'] %}{% set image = '' %}"
            "{% elif message['content'] | selectattr('type', 'equalto', 'image') | list | length > 1 %}"
            "{% set said = namespace(text='', image='') %}{% for part in message['content'] %}"
            f"{{% if part['type'] == 'text' %}}{{% set said.text = said.text + part['text'] %}}"
            f"{{% elif said.text %}}{{% set said.text = said.text + '{IMAGE}' %}}"
            f"{{% else %}}{{% set said.image = said.image + '{IMAGE}\\n' %}}{{% endif %}}{{% endfor %}}"
            "{% set text = said.text %}{% set image = said.image %}"
            "{% else %}"
            "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
            f"{{% set image = '{IMAGE}\\n' if message['content'] | selectattr('type', 'equalto', 'image') | list else '' %}}"
            "{% endif %}"
            f"{{% if message['role'] == 'user' %}}{{{{ '{USER} ' + image + text + ' {ASSISTANT}' }}}}"
            f"{{% elif message['role'] == 'assistant' %}}{{{{ ' ' + text + '{self.eos}' }}}}"
            "{% endif %}{% endfor %}"
        )


class ChatTemplate:
    """The processor's own chat template, rendered once per shape of the turns for its text around questions and answers.

    An answer follows the last words of the prompt directly, and ends with the first special token after it. Text that the
    template adds before a given answer (Qwen3's empty thoughts) is left out, as generation does not produce it; added white
    space is kept as part of the answer.

    Raises ModelError if there is no template, if it has no place for an image, if it ends an answer without a special token
    (a model trained on it never learns to stop), or if it does not write turns one after another.
    """

    def __init__(self, system: str, processor: Any) -> None:
        self.system = system
        self._tokenizer = processor.tokenizer
        self._image_token = processor.image_token
        self._name = processor.tokenizer.name_or_path
        self.jinja: str = processor.chat_template or processor.tokenizer.chat_template or ""
        if not self.jinja:
            raise ModelError(f"{self._name}: neither processor nor tokenizer has a chat template; set template.style: vicuna")
        if "strftime_now" in self.jinja and ONE_DATE not in self.jinja:
            self.jinja = ONE_DATE + self.jinja
        self._around(("it",), 0)
        tail = self._around(("t",), 1)[-1]
        self.eos = self._end(tail)
        self._tail = tail[: tail.index(self.eos) + len(self.eos)]
        bos = self._tokenizer.bos_token
        self.wants_special_tokens = not (bos and self._around(("t",), 0)[0].startswith(bos))
        self._frames: dict[tuple[Shape, bool], list[Part | None]] = {}

    def render(self, turns: Sequence[Turn], images: Sequence[str], answer: bool = True) -> Rendered:
        """As `Template.render`, with newlines after images as in this template."""
        asked = [pieces(turn.question) for turn in (turns if answer else turns[:1])]
        shape = tuple("".join("i" if piece is None else "t" for piece in question) for question in asked)
        texts = iter(
            Part(text, own=False, response=response)
            for question, turn in zip(asked, turns, strict=False)
            for text, response in [*((piece, False) for piece in question if piece is not None), (turn.answer.strip(), True)]
        )
        shown, parts = iter(images), []
        for piece in self._frame(shape, answer):
            if piece is None:
                parts.append(next(texts))
                continue
            first, *others = piece.text.split(self._image_token)
            parts.append(piece._replace(text=first))
            for text in others:
                parts += [Part(next(shown), own=True, image=True), piece._replace(text=text)]
        return Rendered(tuple(parts))

    def _frame(self, shape: Shape, answer: bool) -> list[Part | None]:
        """Template text around turns of this shape, None for each text of the data."""
        if (shape, answer) not in self._frames:
            self._frames[shape, answer] = self._framed(shape) if answer else self._prompt(shape)
        return self._frames[shape, answer]

    def _prompt(self, shape: Shape) -> list[Part | None]:
        first, *others = (Part(words, own=True) for words in self._around(shape, 0))
        return [first, *(piece for words in others for piece in (None, words))]

    def _framed(self, shape: Shape) -> list[Part | None]:
        first, *around = self._around(shape, len(shape))
        alone = self._around(shape[:1], 0)
        heads = {asked: self._around((shape[0], asked), 1)[-1] for asked in set(shape[1:])}
        frame: list[Part | None] = [Part(first, own=True)]
        end = len(self._tail)
        for index, asked in enumerate(shape):
            texts = asked.count("t")
            (*between, before, after), around = around[: texts + 1], around[texts + 1 :]
            head = heads[asked] if index else alone[-1]
            lead = before.removeprefix(head) if before.startswith(head) else ""
            if alone[0] != first or not after.startswith(self._tail):
                raise ModelError(
                    f"{self._name}: its chat template writes a turn differently once another follows, so that where answers"
                    " stand is not known; set template.style: vicuna"
                )
            for words in between:
                frame += [None, Part(words, own=True)]
            frame += [None, Part(head, own=True), Part("" if lead.strip() else lead, own=True, response=True)]
            frame += [None, Part(after[:end], own=True, response=True), Part(after[end:], own=True)]
        return frame

    def _around(self, shape: Shape, answers: int) -> list[str]:
        """Template text before, between and after the texts of questions and answers; up to the generation prompt if the last
        question has no answer. The template renders placeholders, so no text of the data changes its output."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        slots = count()
        images = [0]  # before, between and after the texts
        for index, asked in enumerate(shape):
            content: list[dict[str, str]] = []
            for kind in asked:
                content.append({"type": "image"} if kind == "i" else {"type": "text", "text": _slot(next(slots))})
                images[-1:] = [images[-1] + 1] if kind == "i" else [images[-1], 0]
            messages.append({"role": "user", "content": content})
            if index < answers:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": _slot(next(slots))}]})
                images.append(0)
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self.jinja, tokenize=False, add_generation_prompt=answers < len(shape)
            )
        except Exception as error:  # third-party Jinja may raise anything
            raise ModelError(
                f"{self._name}: its chat template refuses these turns: {error}; set template.style: vicuna"
            ) from None
        found = SLOT.split(text)
        if [int(slot) for slot in found[1::2]] != list(range(next(slots))):
            raise ModelError(
                f"{self._name}: its chat template leaves out, repeats or reorders turns; set template.style: vicuna"
            )
        words = found[::2]
        places = [text.count(self._image_token) for text in words]
        if places != images and not (sum(places) == sum(images) == shape[0].count("i") == 1):
            several = f"several images in one conversation (it writes {sum(places)} of {sum(images)}, or elsewhere)"
            raise ModelError(
                f"{self._name}: its chat template has no place for {several if sum(images) > 1 else 'an image'}"
                f" ({self._image_token!r}); set template.style: vicuna{', or leave those rows out' if sum(images) > 1 else ''}"
            )
        return words

    def _end(self, tail: str) -> str:
        """First special token after an answer."""
        found = [(tail.find(token), token) for token in special_tokens(self._tokenizer) if token in tail]
        if not found:
            raise ModelError(
                f"{self._name}: its chat template ends an answer without a special token, and a model trained so never learns"
                " to stop; set template.style: vicuna"
            )
        return min(found)[1]


SLOT = re.compile("\ue000([0-9]+)\ue001")  # private-use characters, which no template writes


def _slot(number: int) -> str:
    return f"\ue000{number}\ue001"


def _try(template: Template | ChatTemplate, processor: Any) -> None:
    """Raises ModelError if a prompt's tokens are not a prefix of its training sample's, or if a response span does not end with
    its only EOS."""
    tokenizer = processor.tokenizer
    for turn_count in (1, 2, 3):
        for images in ([], [processor.image_token]):
            turns = [Turn(f"{IMAGE * len(images)}What?", "This"), Turn("And?", "That"), Turn("Why?", "So")][:turn_count]
            prompt, whole = (template.render(turns, images, answer) for answer in (False, True))
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
    """Question without its image marks."""
    return turn.question.replace(IMAGE, "").strip()


def pieces(question: str) -> list[str | None]:
    """Texts of a question, at least one, and its images, as None, in order. White space around the question, and after images
    that open it, is stripped."""
    first, *others = question.strip().split(IMAGE)
    found: list[str | None] = [first] if first else []
    for text in others:
        text = text if any(found) else text.lstrip()
        found += [None, text] if text else [None]
    return found if any(found) else [*found, ""]


def with_marks(question: str) -> str:
    """Question text without the marks of images that open it; all marks are kept if one stands among the words."""
    found = pieces(question)
    words = [IMAGE if piece is None else piece for piece in found]
    return "".join(words if None in found[found.index(next(filter(None, found), "")) :] else filter(None, found)).strip()


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Special tokens: named ones (EOS, ...) and unnamed ones, such as turn markers."""
    marked = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *marked]))
