"""A checkpoint's own chat template, cut into its text around the texts of the data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from typing import Any

from components.dataset.shards import Turn
from components.errors import ModelError
from components.models.rendered import Part, Rendered, pieces

# Fixed date for templates that write today's: the same text on every day of training and after. Llama 3's default.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"

Shape = tuple[str, ...]  # images and texts of each question in order: "it", "iit", "tit", "t", ...
SLOT = re.compile("\ue000([0-9]+)\ue001")  # private-use characters, which no template writes


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
        self._bos, self._prompt_end = written_by_processor(processor)
        if "strftime_now" in self.jinja and FIXED_DATE not in self.jinja:
            self.jinja = FIXED_DATE + self.jinja
        self._surrounding_texts(("it",), 0)
        tail = self._surrounding_texts(("t",), 1)[-1]
        self.eos = self._find_eos(tail)
        self._tail = tail[: tail.index(self.eos) + len(self.eos)]
        bos = self._tokenizer.bos_token
        self.wants_special_tokens = not (bos and self._surrounding_texts(("t",), 0)[0].startswith(bos))
        self._frames: dict[tuple[Shape, bool], list[Part | None]] = {}

    def render(self, turns: Sequence[Turn], images: Sequence[str] | None, answer: bool = True) -> Rendered:
        """As `Template.render`, with newlines after images as in this template."""
        questions = [pieces(turn.question) for turn in (turns if answer else turns[:1])]
        shape = tuple("".join("i" if piece is None else "t" for piece in question) for question in questions)
        texts = iter(
            Part(text, template=False, response=response)
            for question, turn in zip(questions, turns, strict=False)
            for text, response in [*((piece, False) for piece in question if piece is not None), (turn.answer.strip(), True)]
        )
        image_texts, parts = iter(images or ()), []
        for piece in self._frame(shape, answer):
            if piece is None:
                parts.append(next(texts))
                continue
            first, *others = piece.text.split(self._image_token)
            parts.append(piece._replace(text=first))
            for text in others:
                parts += [Part(next(image_texts), template=True, image=True), piece._replace(text=text)]
        return Rendered(tuple(parts))

    def _frame(self, shape: Shape, answer: bool) -> list[Part | None]:
        """Template text around turns of this shape, None for each text of the data."""
        if (shape, answer) not in self._frames:
            self._frames[shape, answer] = self._training_frame(shape) if answer else self._prompt_frame(shape)
        return self._frames[shape, answer]

    def _prompt_frame(self, shape: Shape) -> list[Part | None]:
        first, *others = (Part(text, template=True) for text in self._surrounding_texts(shape, 0))
        return [first, *(piece for text in others for piece in (None, text))]

    def _training_frame(self, shape: Shape) -> list[Part | None]:
        first, *surrounding = self._surrounding_texts(shape, len(shape))
        prompt_texts = self._surrounding_texts(shape[:1], 0)
        heads = {question: self._surrounding_texts((shape[0], question), 1)[-1] for question in set(shape[1:])}
        frame: list[Part | None] = [Part(first, template=True)]
        end = len(self._tail)
        for index, question in enumerate(shape):
            count = question.count("t")
            (*between, before, after), surrounding = surrounding[: count + 1], surrounding[count + 1 :]
            head = heads[question] if index else prompt_texts[-1]
            lead = before.removeprefix(head) if before.startswith(head) else ""
            if prompt_texts[0] != first or not after.startswith(self._tail):
                raise ModelError(
                    f"{self._name}: its chat template writes a turn differently once another follows, so that where answers"
                    " stand is not known; set template.style: vicuna"
                )
            for text in between:
                frame += [None, Part(text, template=True)]
            frame += [None, Part(head, template=True), Part("" if lead.strip() else lead, template=True, response=True)]
            frame += [None, Part(after[:end], template=True, response=True), Part(after[end:], template=True)]
        return frame

    def _surrounding_texts(self, shape: Shape, answers: int) -> list[str]:
        """Template text before, between and after the texts of questions and answers; up to the generation prompt if the last
        question has no answer. The template renders placeholders, so no text of the data changes its output."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        slots = count()
        expected = [0]  # before, between and after the texts
        for index, question in enumerate(shape):
            content: list[dict[str, str]] = []
            for kind in question:
                content.append({"type": "image"} if kind == "i" else {"type": "text", "text": _slot(next(slots))})
                expected[-1:] = [expected[-1] + 1] if kind == "i" else [expected[-1], 0]
            messages.append({"role": "user", "content": content})
            if index < answers:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": _slot(next(slots))}]})
                expected.append(0)
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self.jinja, tokenize=False, add_generation_prompt=answers < len(shape)
            )
        except Exception as error:  # third-party Jinja may raise anything
            raise ModelError(
                f"{self._name}: its chat template refuses these turns: {error}; set template.style: vicuna"
            ) from None
        if answers < len(shape):
            text += self._prompt_end
        before = text.split(self._image_token, shape[0].count("i"))
        before[-1] = self._bos + before[-1]
        text = self._image_token.join(before)
        slots_and_texts = SLOT.split(text)
        if [int(slot) for slot in slots_and_texts[1::2]] != list(range(next(slots))):
            raise ModelError(
                f"{self._name}: its chat template leaves out, repeats or reorders turns; set template.style: vicuna"
            )
        texts = slots_and_texts[::2]
        image_counts = [text.count(self._image_token) for text in texts]
        if image_counts != expected and not (sum(image_counts) == sum(expected) == shape[0].count("i") == 1):
            several = f"several images in one conversation (it writes {sum(image_counts)} of {sum(expected)}, or elsewhere)"
            raise ModelError(
                f"{self._name}: its chat template has no place for {several if sum(expected) > 1 else 'an image'}"
                f" ({self._image_token!r}); set template.style: vicuna"
                f"{', or leave those rows out' if sum(expected) > 1 else ''}"
            )
        return texts

    def _find_eos(self, tail: str) -> str:
        """First special token after an answer."""
        positions = [(tail.find(token), token) for token in special_tokens(self._tokenizer) if token in tail]
        if not positions:
            raise ModelError(
                f"{self._name}: its chat template ends an answer without a special token, and a model trained so never learns"
                " to stop; set template.style: vicuna"
            )
        return min(positions)[1]


def written_by_processor(processor: Any) -> tuple[str, str]:
    """BOS and end of a prompt that PaliGemma's processor writes, not its tokenizer: BOS after the images of the first question,
    or before a text without any."""
    return (processor.tokenizer.bos_token, "\n") if type(processor).__name__ == "PaliGemmaProcessor" else ("", "")


def _slot(number: int) -> str:
    return f"\ue000{number}\ue001"


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Special tokens: named ones (EOS, ...) and unnamed ones, such as turn markers."""
    flagged = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *flagged]))
