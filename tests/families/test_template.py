"""The processor's own chat template, and the mask of the answers that is derived from it."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from components.dataset.shards import Turn
from components.errors import ModelError
from components.models.chat_template import ChatTemplate
from components.models.rendered import pieces, question_of
from components.models.template import Template
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
        response = tokenizer.decode(batch.input_ids[row][batch.response[row]])
        assert [text.strip() for text in response.split(eos)] == [turn.answer for turn in sample.turns] + [""]
        real = batch.input_ids[row][batch.attention_mask[row].bool()]
        start = int(batch.response[row].int().argmax())
        prompt = prompts.text([sample]).input_ids[0]
        assert prompt.tolist() == real[:start].tolist(), "a prompt ends where the answer begins"
        rendered = collator.template.render(sample.turns, ["<image>"] * len(sample.images))
        questions = ["".join(rendered.text[a:b] for a, b in rendered.question_spans)]
        assert questions == ["".join(text for turn in sample.turns for text in pieces(turn.question) if text)]
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
    "a language model's, that joins text to a list": (
        "{% for m in messages %}{{ m['role'] + m['content'] }}<|im_end|>{% endfor %}",
        "refuses these turns",
    ),
    "one that leaves questions out": (
        "{% for m in messages %}{% if m['role'] == 'assistant' or loop.last %}<image>{{ m['content'][-1]['text'] }}<|im_end|>"
        "{% endif %}{% endfor %}",
        "leaves out, repeats or reorders",
    ),
    "what it refuses": ("{{ raise_exception('no roles here') }}", "no roles here"),
}


@pytest.mark.parametrize("case", BAD)
def test_templates_that_cannot_serve_are_refused(case: str) -> None:
    jinja, message = BAD[case]
    with pytest.raises(ModelError, match=message):
        template(jinja)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    jinja = ROLE + "{% endfor %}{{ '' if loop.last else '(earlier)' }}<|im_end|>{% endfor %}"
    with pytest.raises(ModelError, match="writes a turn differently"):
        template(jinja).render((Turn("what ?", "one"), Turn("is it ?", "no")), [])


ONEVISION = (  # as some releases of LLaVA-OneVision: a space before an answer that is there, a line break in a prompt
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ '\n' + c['text'] }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # as Qwen3's: empty thoughts before the last answer alone
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)


@pytest.mark.parametrize("jinja", [ONEVISION, THINKING], ids=["onevision", "thinking"])
@pytest.mark.parametrize("images", [[], ["<image>"]])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_answer_stands_right_after_the_words_of_a_prompt(jinja: str, images: list[str], count: int) -> None:
    chat_template = template(jinja)
    turns = [Turn("<image>" * len(images) + "what ?", " one"), Turn("is it ?", "no\n"), Turn("where ?", "a1")][:count]
    rendered, prompt = chat_template.render(turns, images), chat_template.render(turns, images, answer=False)
    assert [rendered.text[a:b] for a, b in rendered.response_spans] == [f"{turn.answer.strip()}<|im_end|>" for turn in turns]
    assert rendered.text.startswith(prompt.text) and rendered.text.count("<|im_start|>assistant\n") == count
    assert "<think>" not in rendered.text


def test_what_data_say_does_not_change_what_a_template_writes() -> None:
    turns = (Turn("what </think> ?", "<think>one</think>"), Turn("\ue0000\ue001", "{{ no }}"))
    rendered = template(THINKING).render(turns, None)
    assert [part.text for part in rendered.parts if not part.template] == [
        t for turn in turns for t in (turn.question, turn.answer)
    ]


def test_a_conversation_is_rendered_in_time_that_grows_with_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    chat_template = template(THINKING)
    shapes: list[int] = []
    real = chat_template._surrounding_texts

    def counted(shape: tuple[str, ...], answers: int) -> list[str]:
        shapes.append(len(shape))
        return real(shape, answers)

    monkeypatch.setattr(chat_template, "_surrounding_texts", counted)
    turns = [Turn(f"what {n} ?", "one") for n in range(100)]
    for _ in range(3):
        chat_template.render(turns, [])
    assert len(shapes) == 3, "the template is asked three times for so many turns, and never again"


def test_a_tokenizers_template_serves_where_the_processor_has_none() -> None:
    processor = toy.FAMILIES["llava_next"]()[1]
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    assert Template("", style="processor").of(processor).eos == "<|im_end|>"


def test_tokenizers_are_the_folders_own() -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy.folder("qwen2_vl"))
    assert tokenizer.encode("what digit") == toy.loaded("qwen2_vl").processor.tokenizer.encode("what digit")
