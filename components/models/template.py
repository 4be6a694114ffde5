"""Chat templates: the paper's Vicuna style (docs/method.md, "Recipe of the paper"), or the checkpoint's own.

{system }USER: <image>\\n{q} ASSISTANT: {a}<|endoftext|>USER: {q} ASSISTANT: {a}<|endoftext|>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from components.dataset.shards import IMAGE as IMAGE
from components.dataset.shards import Turn
from components.errors import ModelError
from components.models.chat_template import ChatTemplate, written_by_processor
from components.models.rendered import Part, Rendered, pieces

if TYPE_CHECKING:
    from components.config.models import Template as TemplateSettings

EOS = "<|endoftext|>"
USER, ASSISTANT = "USER:", "ASSISTANT:"


@dataclass(frozen=True)
class Template:
    """Settings of a chat template: `system` text before the first turn, may be empty; `eos` ends every answer.

    `style` processor: the chat template of the processor that `of` is called with. `bos`, `prompt_end`: see
    `written_by_processor`.
    """

    system: str
    eos: str = EOS
    style: Literal["vicuna", "processor"] = "vicuna"
    bos: str = ""
    prompt_end: str = ""
    wants_special_tokens = True  # leading special tokens of the tokenizer (BOS), if it adds any

    @classmethod
    def from_settings(cls, settings: TemplateSettings) -> Template:
        return cls(settings.system, style=settings.style)

    @property
    def identity(self) -> str:
        """Key that is equal for settings of equal rendering; a checkpoint's own template is not part of it."""
        return self.jinja if self.style == "vicuna" else f"processor\n{self.system}"

    def of(self, processor: Any) -> Template | ChatTemplate:
        """Template bound to a processor, tried on up to three turns. Raises ModelError as `ChatTemplate` and `_validate` do."""
        if self.style == "processor":
            bound: Template | ChatTemplate = ChatTemplate(self.system, processor)
        else:
            bos, prompt_end = written_by_processor(processor)
            bound = replace(self, eos=processor.tokenizer.eos_token, bos=bos, prompt_end=prompt_end)
        _validate(bound, processor)
        return bound

    def render(self, turns: Sequence[Turn], images: Sequence[str] | None, answer: bool = True) -> Rendered:
        """Text of all `turns`; of the first one up to `ASSISTANT:`, if not `answer`. Answers are stripped of white space.

        `images`: placeholder of each image (the image token, once per visual token), in the order of their marks, or None; a
        newline follows those that open a question, and parts any two, whose tokens are one image to Qwen's position ids else.
        The space before an answer is part of it: tokenizers join it to the first word, and a prompt ends without it.
        """
        bos, system = self.bos, f"{self.system} " if self.system else ""
        if None not in pieces(turns[0].question):
            bos, system = "", bos + system
        parts, image_texts = [Part(system, template=True)], iter(images or ())
        for turn in turns if answer else turns[:1]:
            parts.append(Part(f"{USER} ", template=True))
            question = pieces(turn.question)
            first_text = question.index(next(filter(None, question), ""))
            for index, piece in enumerate(question):
                if piece is None:
                    newline = "\n" * (index < first_text or question[index + 1 : index + 2] == [None])
                    after = newline if None in question[index + 1 :] else bos + newline
                    parts += [Part(next(image_texts), template=True, image=True), Part(after, template=True)]
                else:
                    parts.append(Part(piece, template=False))
            bos = ""
            parts.append(Part(f" {ASSISTANT}{self.prompt_end}", template=True))
            if answer:
                parts += [
                    Part(f" {turn.answer.strip()}", template=False, response=True),
                    Part(self.eos, template=True, response=True),
                ]
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
            f"{{% elif said.text %}}{{% set newline = '\\n' if said.text.endswith('{IMAGE}') else '' %}}"
            f"{{% set said.text = said.text + newline + '{IMAGE}' %}}"
            f"{{% else %}}{{% set said.image = said.image + '{IMAGE}\\n' %}}{{% endif %}}{{% endfor %}}"
            "{% set text = said.text %}{% set image = said.image %}"
            "{% else %}"
            "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
            f"{{% set image = '{IMAGE}\\n' if message['content'] | selectattr('type', 'equalto', 'image') | list else '' %}}"
            "{% endif %}"
            f"{{% if message['role'] == 'user' %}}{{{{ '{USER} ' + image + text + ' {ASSISTANT}' }}}}"
            f"{{% elif message['role'] == 'assistant' %}}{{{{ {self.prompt_end + ' '!r} + text + '{self.eos}' }}}}"
            "{% endif %}{% endfor %}"
        )


def _validate(template: Template | ChatTemplate, processor: Any) -> None:
    """Raises ModelError if a prompt's tokens are not a prefix of its training sample's, or if a response span does not end with
    its only EOS."""
    tokenizer = processor.tokenizer
    for turn_count in (1, 2, 3):
        for images in ([], [processor.image_token]):
            turns = [Turn(f"{IMAGE * len(images)}What?", "This"), Turn("And?", "That"), Turn("Why?", "So")][:turn_count]
            prompt, full = (template.render(turns, images, answer) for answer in (False, True))
            special = template.wants_special_tokens
            prompt_ids = tokenizer(prompt.text, add_special_tokens=special).input_ids
            encoded = tokenizer(full.text, add_special_tokens=special, return_offsets_mapping=True)
            eos = tokenizer.convert_tokens_to_ids(template.eos)
            for start, end in full.response_spans:
                response = [
                    i for i, (a, b) in zip(encoded.input_ids, encoded.offset_mapping, strict=True) if a < end and b > start
                ]
                if response.count(eos) != 1 or response[-1] != eos:
                    raise ModelError(
                        f"{tokenizer.name_or_path}: an answer is to end with {template.eos!r} once; its tokens are"
                        f" {tokenizer.convert_ids_to_tokens(response)}"
                    )
            if encoded.input_ids[: len(prompt_ids)] != prompt_ids:
                raise ModelError(
                    f"{tokenizer.name_or_path}: the tokens of a prompt, {tokenizer.convert_ids_to_tokens(prompt_ids)[-4:]}, are"
                    " not those that its training sample begins with; set another template.style"
                )
