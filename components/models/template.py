"""How turns become text: the paper's Vicuna-style template (METHOD.md "Recipe of the paper"), or the checkpoint's own.

{system }USER: <image>\\n{q} ASSISTANT: {a}<|endoftext|>USER: {q} ASSISTANT: {a}<|endoftext|>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from components.errors import ModelError
from components.shards import Turn

if TYPE_CHECKING:
    from components.settings import Template as TemplateSettings

IMAGE = "<image>"  # how data sets mark the image's place; the template itself always puts the image first, as LLaVA does
EOS = "<|endoftext|>"
USER, ASSISTANT = "USER:", "ASSISTANT:"


@dataclass(frozen=True)
class Rendered:
    """`text[a:b]` for (a, b) in `response_spans` are the answers, each from the space before it to its EOS, included; in
    `question_spans` the questions, without anything of the template's own."""

    text: str
    response_spans: tuple[tuple[int, int], ...]
    question_spans: tuple[tuple[int, int], ...]


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
        """As it is for this processor. Raises ModelError as `ChatTemplate` does."""
        if self.style == "processor":
            return ChatTemplate(self.system, processor)
        return replace(self, eos=processor.tokenizer.eos_token)

    def render(self, turns: Sequence[Turn], image_text: str | None, answer: bool = True) -> Rendered:
        """Text of all `turns`; of the first one alone, up to `ASSISTANT:`, if not `answer`.

        `image_text` is what stands for the image (the image token, once per visual token); None for text-only samples.
        The space before an answer belongs to the answer: tokenizers join it to the first word, and a prompt ends without it.
        """
        text = f"{self.system} " if self.system else ""
        spans, questions = [], []
        for index, turn in enumerate(turns if answer else turns[:1]):
            image = f"{image_text}\n" if image_text is not None and index == 0 else ""
            text += f"{USER} {image}{question_of(turn)}"
            questions.append((len(text) - len(question_of(turn)), len(text)))
            text += f" {ASSISTANT}"
            if answer:
                start = len(text)
                text += f" {turn.answer}{self.eos}"
                spans.append((start, len(text)))
        return Rendered(text, tuple(spans), tuple(questions))

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
    """The processor's own chat template, with the spans of its answers found by rendering one turn more at a time.

    An answer's span ends with the first special token after it: whatever stands between that and the next turn is no answer.

    Raises ModelError if there is no template, if it has no place for an image, if it ends an answer without a special token
    (a model trained so never learns to stop), or if it writes an earlier turn differently once another follows.
    """

    def __init__(self, system: str, processor: Any) -> None:
        self.system = system
        self._tokenizer = processor.tokenizer
        self._image_token = processor.image_token
        self._name = processor.tokenizer.name_or_path
        self.jinja: str = processor.chat_template or processor.tokenizer.chat_template or ""
        if not self.jinja:
            raise ModelError(f"{self._name}: neither processor nor tokenizer has a chat template; set template.style: vicuna")
        if self._text((Turn("?", ""),), True, answers=0).count(self._image_token) != 1:
            raise ModelError(
                f"{self._name}: its chat template has no place for an image ({self._image_token!r}); set template.style: vicuna"
            )
        probe = (Turn("?", "Yes"),)
        self.eos = self._end(self._text(probe, False, 1)[len(self._text(probe, False, 0)) :])
        start = self._text(probe, False, 0)
        bos = self._tokenizer.bos_token
        self.wants_special_tokens = not (bos and start.startswith(bos))

    def render(self, turns: Sequence[Turn], image_text: str | None, answer: bool = True) -> Rendered:
        """As `Template.render`."""
        shown = image_text is not None
        if not answer:
            prompt = self._with_image(self._text(turns[:1], shown, 0), image_text)
            return Rendered(prompt, (), (self._question_in(prompt, turns[0], 0, image_text),))
        whole = self._with_image(self._text(turns, shown, len(turns)), image_text)
        spans, questions, end = [], [], 0
        for index in range(len(turns)):
            before = self._with_image(self._text(turns[: index + 1], shown, index), image_text)
            after = self._with_image(self._text(turns[: index + 1], shown, index + 1), image_text)
            if not (after.startswith(before) and whole.startswith(after)):
                raise ModelError(
                    f"{self._name}: its chat template writes a turn differently once its answer or another turn follows, so"
                    " that where answers stand is not known; set template.style: vicuna"
                )
            questions.append(self._question_in(before, turns[index], end, image_text if index == 0 else None))
            rest = after[len(before) :]
            answer_at = rest.find(turns[index].answer.strip())
            if answer_at < 0:
                raise ModelError(f"{self._name}: its chat template changes an answer's text: {turns[index].answer[:40]!r}")
            end = rest.find(self.eos, answer_at + len(turns[index].answer.strip()))
            end += len(before) + len(self.eos)
            spans.append((len(before), end))
        return Rendered(whole, tuple(spans), tuple(questions))

    def _question_in(self, text: str, turn: Turn, start: int, image_text: str | None) -> tuple[int, int]:
        """The question's span in `text[start:]`, behind the image if there is one."""
        if image_text is not None:
            start = text.index(image_text, start) + len(image_text)
        at = text.find(question_of(turn), start)
        if at < 0:
            raise ModelError(f"{self._name}: its chat template changes a question's text: {question_of(turn)[:40]!r}")
        return at, at + len(question_of(turn))

    def _text(self, turns: Sequence[Turn], image: bool, answers: int) -> str:
        """Of `turns`, the first `answers` of them answered; else it ends where the next answer begins."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        for index, turn in enumerate(turns):
            content = [{"type": "text", "text": question_of(turn)}]
            shown = [{"type": "image"}] if image and index == 0 else []
            messages.append({"role": "user", "content": [*shown, *content]})
            if index < answers:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self.jinja, tokenize=False, add_generation_prompt=answers < len(turns)
            )
        except TemplateError as error:
            raise ModelError(
                f"{self._name}: its chat template refuses these turns: {error}; set template.style: vicuna"
            ) from None
        return text

    def _with_image(self, text: str, image_text: str | None) -> str:
        return text if image_text is None else text.replace(self._image_token, image_text, 1)

    def _end(self, rest: str) -> str:
        """The special token that ends an answer."""
        tail = rest.partition("Yes")[2]
        found = [(tail.find(token), token) for token in special_tokens(self._tokenizer) if token in tail]
        if not found:
            raise ModelError(
                f"{self._name}: its chat template ends an answer without a special token, and a model trained so never learns"
                " to stop; set template.style: vicuna"
            )
        return min(found)[1]


def question_of(turn: Turn) -> str:
    """The question without the mark of the image's place."""
    return turn.question.replace(IMAGE, "").strip()


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Those with a name (EOS, ...) and those without, such as the marks of a turn."""
    marked = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *marked]))
