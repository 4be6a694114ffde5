"""The processor's own chat template, and the mask of the answers that is derived from it."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from components.errors import ModelError
from components.models.template import ChatTemplate, Template, question_of
from components.shards import Turn
from tests.families import toy
from tests.families.table import documented

TITLE = "own template"
WITHOUT = ("llava", "paligemma")  # as toys; so is PaliGemma as released


def check(family: str) -> str:
    processor = toy.loaded(family).processor
    if processor.chat_template is None:
        with pytest.raises(ModelError, match=r"has a chat template; set template.style: vicuna"):
            toy.collator(family, style="processor")
        return "none: vicuna"
    tokenizer = processor.tokenizer
    collator, prompts = toy.collator(family, style="processor"), toy.collator(family, train=False, style="processor")
    batch = collator.text(toy.SAMPLES)
    eos = collator.template.eos
    for row, sample in enumerate(toy.SAMPLES):
        said = tokenizer.decode(batch.input_ids[row][batch.response[row]])
        assert [text.strip() for text in said.split(eos)] == [turn.answer for turn in sample.turns] + [""]
        real = batch.input_ids[row][batch.attention_mask[row].bool()]
        start = int(batch.response[row].int().argmax())
        prompt = prompts.text([sample]).input_ids[0]
        assert prompt.tolist() == real[:start].tolist(), "a prompt ends where the answer begins"
        rendered = collator.template.render(sample.turns, None)
        assert [rendered.text[a:b] for a, b in rendered.question_spans] == [question_of(turn) for turn in sample.turns]
        if tokenizer.bos_token is not None:
            assert real.tolist().count(tokenizer.bos_token_id) == 1
    # Token for token what the stock processor makes of the same turns.
    images = [toy.image(40, 20, sum(b"wide"))]
    turn = toy.SAMPLES[0].turns[0]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question_of(turn)}]},
        {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]},
    ]
    text = tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False)
    stock = processor(images=images, text=[text], add_special_tokens=False, return_tensors="pt").input_ids[0]
    assert batch.input_ids[0][batch.attention_mask[0].bool()].tolist() == stock.tolist()
    return f"`{eos}`"


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_masks_decode_to_the_answers(family: str) -> None:
    assert check(family) == documented(family, TITLE)


def template(jinja: str) -> ChatTemplate:
    processor = toy.FAMILIES["llava_next"]()[1]
    processor.chat_template = jinja
    return Template("", style="processor").of(processor)


ROLE = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"
)
BAD = {
    "nothing ends an answer": (ROLE + "{% endfor %} {% endfor %}", "never learns to stop"),
    "no place for an image": (ROLE.replace("<image>", "") + "{% endfor %}<|im_end|>{% endfor %}", "no place for an image"),
    "what it refuses": ("{{ raise_exception('no roles here') }}", "no roles here"),
}


@pytest.mark.parametrize("case", BAD)
def test_templates_that_cannot_serve_are_refused(case: str) -> None:
    jinja, said = BAD[case]
    with pytest.raises(ModelError, match=said):
        template(jinja)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    jinja = ROLE + "{% endfor %}{{ '' if loop.last else '(earlier)' }}<|im_end|>{% endfor %}"
    with pytest.raises(ModelError, match="writes a turn differently"):
        template(jinja).render((Turn("what ?", "one"), Turn("is it ?", "no")), None)


def test_a_tokenizers_template_serves_where_the_processor_has_none() -> None:
    processor = toy.FAMILIES["llava_next"]()[1]
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    assert Template("", style="processor").of(processor).eos == "<|im_end|>"


def test_tokenizers_are_the_folders_own() -> None:
    own = AutoTokenizer.from_pretrained(toy.folder("qwen2_vl"))
    assert own.encode("what digit") == toy.loaded("qwen2_vl").processor.tokenizer.encode("what digit")
