"""The prompt template (Vicuna style, METHOD.md "Recipe of the paper"): the one place that knows how turns become text.

{system }USER: <image>\\n{q} ASSISTANT: {a}<|endoftext|>USER: {q} ASSISTANT: {a}<|endoftext|>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.shards import Turn

IMAGE = "<image>"  # how data sets mark the image's place; the template itself always puts the image first, as LLaVA does
EOS = "<|endoftext|>"
USER, ASSISTANT = "USER:", "ASSISTANT:"


@dataclass(frozen=True)
class Rendered:
    """`text[a:b]` for (a, b) in `response_spans` are the answers, each from the space before it to its EOS, included."""

    text: str
    response_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Template:
    """`system` stands before the first turn; may be empty. `eos` ends every answer."""

    system: str
    eos: str = EOS

    def render(self, turns: Sequence[Turn], image_text: str | None, answer: bool = True) -> Rendered:
        """Text of all `turns`; of the first one alone, up to `ASSISTANT:`, if not `answer`.

        `image_text` is what stands for the image (the image token, once per visual token); None for text-only samples.
        The space before an answer belongs to the answer: tokenizers join it to the first word, and a prompt ends without it.
        """
        text = f"{self.system} " if self.system else ""
        spans = []
        for index, turn in enumerate(turns if answer else turns[:1]):
            image = f"{image_text}\n" if image_text is not None and index == 0 else ""
            text += f"{USER} {image}{question_of(turn)} {ASSISTANT}"
            if answer:
                start = len(text)
                text += f" {turn.answer}{self.eos}"
                spans.append((start, len(text)))
        return Rendered(text, tuple(spans))

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


def question_of(turn: Turn) -> str:
    """The question without the mark of the image's place."""
    return turn.question.replace(IMAGE, "").strip()
