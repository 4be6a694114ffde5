from components.dataset.shards import Turn
from components.models.chat_template import ChatTemplate
from components.models.template import Template
from tests.models.conftest import word_processor

TURNS = (Turn("<image>\nwhat digit is at a1 ?", "one"), Turn("list the grid .", "red one, red two"))


def test_text_is_that_of_the_method() -> None:
    rendered = Template("be brief .").render(TURNS, ["<image><image>"])
    assert rendered.text == (
        "be brief . USER: <image><image>\nwhat digit is at a1 ? ASSISTANT: one<|endoftext|>"
        "USER: list the grid . ASSISTANT: red one, red two<|endoftext|>"
    )
    answers = [rendered.text[a:b] for a, b in rendered.response_spans]
    assert answers == [" one<|endoftext|>", " red one, red two<|endoftext|>"]
    assert [rendered.text[a:b] for a, b in rendered.question_spans] == ["what digit is at a1 ?", "list the grid ."]


def test_prompt_is_the_first_turn_up_to_where_the_answer_begins() -> None:
    prompt = Template("").render(TURNS, ["<image>"], answer=False)
    assert prompt.text == "USER: <image>\nwhat digit is at a1 ? ASSISTANT:"
    assert prompt.response_spans == ()
    assert [prompt.text[a:b] for a, b in prompt.question_spans] == ["what digit is at a1 ?"]
    full = Template("").render(TURNS, ["<image>"])
    assert full.text[: full.response_spans[0][0]] == prompt.text


def test_images_stand_where_the_data_put_them_a_line_each_where_they_open_a_question() -> None:
    turns = (Turn("<image> <image>what ?", "one"), Turn("at <image> or <image>", "no"), Turn("in <image><image>", "two"))
    text = Template("").render(turns, "abcdef", answer=True).text
    assert text == (
        "USER: a\nb\nwhat ? ASSISTANT: one<|endoftext|>USER: at c or d ASSISTANT: no<|endoftext|>"
        "USER: in e\nf ASSISTANT: two<|endoftext|>"
    )


def test_text_only_has_no_image_and_no_line_break() -> None:
    assert Template("").render((Turn("list .", "one"),), None).text == "USER: list . ASSISTANT: one<|endoftext|>"


def test_chat_template_says_the_same() -> None:
    for system in ("", "it's \\ brief ."):
        template = Template(system)
        processor = word_processor()
        processor.chat_template = template.jinja
        image, text = {"type": "image"}, {"type": "text", "text": "what digit is at a1 ?"}
        messages = [{"role": "user", "content": [image, text]}]
        assert processor.apply_chat_template(messages) == template.render(TURNS, ["<image>"], answer=False).text
        several = [
            {"role": "user", "content": [image, image, {"type": "text", "text": "at "}, image, {"type": "text", "text": "?"}]}
        ]
        turns = (Turn("<image><image>at <image>?", ""),)
        assert processor.apply_chat_template(several) == template.render(turns, ["<image>"] * 3, answer=False).text
        several[0]["content"][3:3] = [image]
        turns = (Turn("<image><image>at <image><image>?", ""),)
        assert processor.apply_chat_template(several) == template.render(turns, ["<image>"] * 4, answer=False).text
        messages += [{"role": "assistant", "content": "one"}, {"role": "user", "content": "list the grid ."}]
        messages += [{"role": "assistant", "content": "red one, red two"}]
        assert processor.apply_chat_template(messages) == template.render(TURNS, ["<image>"]).text


def test_a_template_that_writes_the_date_writes_one_for_all_days() -> None:
    processor = word_processor()
    processor.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
        "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    )
    assert ChatTemplate("", processor).render(TURNS, ["<image>"], answer=False).text.startswith("26 Jul 2024")
