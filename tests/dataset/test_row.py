"""Rows in the shapes of public data sets: what they are understood as, which rule says so, and what may not pass as text."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest

from components.config.data import DataLimits
from components.dataset.media import Held
from components.dataset.row import DESCRIBE, Row, understand
from components.dataset.shards import Turn
from components.errors import Refusal

LIMITS = DataLimits(max_pixels=100, max_image_mib=1, max_text_chars=200, max_bad_ratio=1)
HELD = Held([0, 512, 9], "0/k")
CAT = "<image>\nWhat is it?"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGM8wYAdMOEQH6QSAKKA"
NAN = float("nan")


def chat(*texts: Any, keys: tuple[str, str] = ("from", "value"), roles: tuple[str, str] = ("human", "gpt")) -> list[Any]:
    return [{keys[0]: roles[n % 2], keys[1]: text} for n, text in enumerate(texts)]


def openai(question: Any, answer: Any) -> list[Any]:
    return chat(question, answer, keys=("role", "content"), roles=("user", "assistant"))


def read(**raw: Any) -> Row:
    return understand(3, {"id": "a", **raw}, LIMITS)


def exchanges(row: Row) -> list[tuple[str, str]]:
    return [(turn.question, turn.answer) for sample in row.samples for turn in sample]


NAMED = {"type": "image", "image": "a.png"}
PARTS = [{"type": "text", "text": "What is it?"}, {"type": "image", "index": 0, "text": None}]
URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

UNDERSTOOD: dict[str, tuple[dict[str, Any], str | Held | None, set[str]]] = {
    "LLaVA": ({"image": "c.png", "conversations": chat(CAT, "A cat.")}, "c.png", set()),
    "its mark last": ({"image": "c.png", "conversations": chat("What is it?\n<image>", "A cat.")}, "c.png", {"image_moved"}),
    "no mark": ({"image": "c.png", "conversations": chat("What is it?", "A cat.")}, "c.png", {"image_first"}),
    "a list of one": ({"image": ["c.png"], "conversations": chat(CAT, "A cat.")}, "c.png", {"image_list"}),
    "images": ({"images": ["c.png"], "conversations": chat(CAT, "A cat.")}, "c.png", {"image_list"}),
    "both, the same": ({"image": "c.png", "images": ["c.png"], "conversations": chat(CAT, "A cat.")}, "c.png", {"image_list"}),
    "null beside images": ({"image": None, "images": [HELD], "conversations": chat(CAT, "A cat.")}, HELD, {"image_list"}),
    "no id": ({"id": None, "image": "c.png", "conversations": chat(CAT, "A cat.")}, "c.png", {"numbered"}),
    "a caption": ({"image": "c.png", "kind": "caption", "conversations": chat(CAT, "A cat.")}, "c.png", {"caption_kind"}),
    "Qwen's roles": (
        {"image": "c.png", "conversations": chat(CAT, "A cat.", roles=("user", "assistant"))},
        "c.png",
        {"roles"},
    ),
    "messages": ({"images": ["c.png"], "messages": openai(CAT, "A cat.")}, "c.png", {"roles", "image_list"}),
    "parts": (
        {"images": [HELD], "messages": openai(PARTS, [{"type": "text", "text": "A cat."}])},
        HELD,
        {"roles", "parts", "image_list", "image_moved"},
    ),
    "a data URL": (
        {"messages": openai([PARTS[0], URL], "A cat.")},
        "data:image/png;base64,AAAA",
        {"roles", "parts", "image_moved"},
    ),
    "a data URL in capitals": (
        {"image": "DATA:IMAGE/PNG;BASE64,AAAA", "conversations": chat(CAT, "A cat.")},
        "data:IMAGE/PNG;BASE64,AAAA",
        set(),
    ),
    "a data URL of no type": (
        {"image": "data:;base64,/9j//4AA", "conversations": chat(CAT, "A cat.")},
        "data:;base64,/9j//4AA",
        set(),
    ),
    "parts without types": (
        {"messages": openai([{"image": "c.png"}, {"text": "What is it?"}], [{"text": "A cat."}])},
        "c.png",
        {"roles", "parts"},
    ),
    "parts of the Responses API": (
        {"messages": openai([{"type": "input_text", "text": "What is it?"}, URL | {"type": "input_image"}], "A cat.")},
        URL["image_url"]["url"],
        {"roles", "parts", "image_moved"},
    ),
    "a picture named in its part and beside": (
        {"images": ["c.png"], "messages": openai([{"type": "image", "image": "c.png"}, PARTS[0]], "A cat.")},
        "c.png",
        {"roles", "parts", "image_list"},
    ),
    "TRL's prompt and completion": (
        {"images": [HELD], "prompt": openai(CAT, "")[:1], "completion": openai("", "A cat.")[1:]},
        HELD,
        {"roles", "image_list"},
    ),
    "base64": ({"image": PNG, "conversations": chat(CAT, "A cat.")}, f"data:image/*;base64,{PNG}", set()),
    "base64 as bytes": (
        {"images": [{"bytes": PNG, "path": None}], "conversations": chat(CAT, "A cat.")},
        f"data:image/*;base64,{PNG}",
        {"image_list"},
    ),
    "pandas' numbers": ({"id": 7.0, "image": "c.png", "kind": NAN, "conversations": chat(CAT, "A cat.")}, "c.png", set()),
    "pandas' nothing": ({"id": NAN, "image": "c.png", "x": NAN, "conversations": chat(CAT, "A cat.")}, "c.png", {"numbered"}),
    "pairs": (
        {"images": [HELD], "texts": [{"user": "What is it?", "assistant": "A cat.", "source": "x"}]},
        HELD,
        {"image_list", "image_first"},
    ),
    "columns": (
        {"image": "c.png", "conversations": {"from": ["human", "gpt"], "value": [CAT, "A cat."]}},
        "c.png",
        {"columns"},
    ),
    "JSON within text": (
        {"image": "c.png", "conversations": '[{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]'},
        "c.png",
        {"json_text", "image_first"},
    ),
    "ShareGPT's greeting": ({"image": "c.png", "conversations": chat(CAT, "A cat.", "And?")}, "c.png", {"last_question"}),
    "an address of the picture beside it": (
        {"image": HELD, "image_url": "https://x.org/c.png", "width": 3, "conversations": chat(CAT, "A cat.")},
        HELD,
        set(),
    ),
}


@pytest.mark.parametrize(("raw", "picture", "rules"), UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_the_same_row_in_every_dialect(raw: dict[str, Any], picture: object, rules: set[str]) -> None:
    row = read(**raw)
    assert (row.pictures, exchanges(row), set(row.rules)) == ((picture,), [(CAT, "A cat.")], rules)


def test_turns_that_have_no_counterpart_are_left_out_and_named() -> None:
    row = read(conversations=[{"from": "gpt", "value": "Hello!"}, *chat("How are you?", "Fine.", "And you?")])
    assert exchanges(row) == [("How are you?", "Fine.")]
    assert "Hello!" in row.rules["first_answer"] and "And you?" in row.rules["last_question"]


@pytest.mark.parametrize(
    "raw",
    [
        {"system": "Be brief.", "conversations": chat("What is it?", "A cat.")},
        {"conversations": [{"from": "system", "value": "Be brief."}, *chat("What is it?", "A cat.")]},
        {"messages": [{"role": "system", "content": "Be brief."}, *openai("What is it?", "A cat.")]},
        {"system": "Be brief.", "messages": [{"role": "system", "content": "Be brief."}, *openai("What is it?", "A cat.")]},
        {"messages": [{"role": "developer", "content": "Be brief."}, *openai("What is it?", "A cat.")]},
        {"system_prompt": "Be brief.", "conversations": chat("What is it?", "A cat.")},
    ],
)
def test_a_system_text_is_kept(raw: dict[str, Any]) -> None:
    row = read(**raw)
    assert exchanges(row) == [("Be brief.\n\nWhat is it?", "A cat.")] and "system" in row.rules


def test_a_system_text_is_no_question() -> None:
    for raw in ({"conversations": chat("", "That.")}, {"texts": [{"user": " ", "assistant": "That."}]}):
        with pytest.raises(Refusal) as refusal:
            read(system="Be brief.", **raw)
        assert refusal.value.reason == "empty_question"


def test_a_system_text_of_a_pair_stands_before_its_question() -> None:
    row = read(texts=[{"user": "What?", "assistant": "A."}, {"system": "Be brief.", "user": "And?", "assistant": "B."}])
    assert exchanges(row) == [("What?", "A."), ("Be brief.\n\nAnd?", "B.")]
    assert "Be brief." in row.rules["system"] and row.ignored == ()


def test_texts_of_a_list_do_not_run_into_one_another() -> None:
    text = [{"type": "text", "text": "left "}, {"type": "text", "text": "or right?"}]
    row = read(image="c.png", messages=openai(["Look.", {"type": "image"}, "Is it", *text], [*text]))
    assert exchanges(row) == [("<image>\nLook. Is it\nleft or right?", "left or right?")]


def test_one_of_several_answers_is_not_known_to_be_meant() -> None:
    with pytest.raises(Refusal, match=r"one text, not a list of 2: 'A cat\.', 'cat'") as refusal:
        read(image="c.png", conversations=chat(CAT, ["A cat.", "cat"]))
    assert refusal.value.reason == "turns"
    assert exchanges(read(image="c.png", conversations=chat(CAT, ["A cat."]))) == [(CAT, "A cat.")]


def test_json_within_text_says_each_key_once() -> None:
    with pytest.raises(Refusal, match="'value' stands twice") as refusal:
        read(conversations='[{"from": "human", "value": "What?", "value": "Who?"}, {"from": "gpt", "value": "That."}]')
    assert refusal.value.reason == "malformed_json"


def test_numbers_are_text_and_null_is_missing() -> None:
    assert exchanges(read(conversations=chat("How many?", 3))) == [("How many?", "3")]
    with pytest.raises(Refusal, match="a turn has 319 characters"):  # beyond what a float holds
        read(conversations=chat("How many?", 10**309))
    for raw, key in (
        ({"conversations": chat("How many?", None)}, "value"),
        ({"conversations": chat("How many?", NAN)}, "value"),
        ({"texts": [{"user": None, "assistant": "A cat."}]}, "user"),
    ):
        with pytest.raises(Refusal, match=f"a turn has no '{key}', or null in it") as refusal:
            read(**raw)
        assert refusal.value.reason == "missing_key"
    with pytest.raises(Refusal, match="is text, not float"):
        read(conversations=chat("How many?", float("inf")))


def test_an_image_of_a_turn_that_is_left_out_goes_with_it() -> None:
    row = read(image="a.png", conversations=chat("How are you?", "Fine.", CAT))
    assert (row.pictures, row.kind, exchanges(row)) == ((), "text", [("How are you?", "Fine.")])
    row = read(images=["a.png", "b.png"], conversations=chat(CAT, "A cat.", "<image>And that?"))
    assert row.pictures == ("a.png",) and exchanges(row) == [(CAT, "A cat.")]
    with pytest.raises(Refusal, match="1 in answers"):
        read(image="a.png", conversations=[{"from": "gpt", "value": "<image>"}, *chat("What?", "A cat.")])


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"weight": 0}, "turns"),
        ({"loss": False}, "turns"),
        ({"tool_calls": [{"id": "1"}]}, "turns"),
        ({"thing": PNG}, "unread_media"),
    ],
)
def test_what_a_turn_says_beside_its_words_is_not_passed_over(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refusal) as refusal:
        read(messages=[openai("What?", "")[0], {**openai("", "That.")[1], **turn}])
    assert refusal.value.reason == reason
    assert read(messages=[{**openai("What?", "")[0], "name": "x"}, openai("", "That.")[1]]).ignored == ("name of a turn",)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"content": "And who?"}, "turns"),
        ({"user": "And who?"}, "turns"),
        ({"role": "system"}, "turns"),
        ({"content": [{"type": "image", "image": "c.png"}]}, "unread_media"),
        ({"content": "What?", "role": "user"}, None),
        ({"user": None, "assistant": ""}, None),
    ],
)
def test_a_turn_says_one_thing(turn: dict[str, Any], reason: str | None) -> None:
    conversation = [{**chat("What?")[0], **turn}, *chat("", "That.")[1:]]
    if reason is None:
        assert exchanges(read(conversations=conversation)) == [("What?", "That.")]
        return
    with pytest.raises(Refusal, match=repr(next(iter(turn)))) as refusal:
        read(conversations=conversation)
    assert refusal.value.reason == reason


@pytest.mark.parametrize("mask", [{"train": False}, {"training": 0}, {"loss_scale": 0.0}, {"loss_mask": 0}, {"weight": 0.0}])
def test_an_answer_or_a_row_that_is_not_to_be_learnt_is_refused(mask: dict[str, Any]) -> None:
    question, answer = chat("What?", "That.")
    with pytest.raises(Refusal, match=repr(next(iter(mask)))) as refusal:
        read(conversations=[question, {**answer, **mask}])
    assert refusal.value.reason == "turns"
    assert exchanges(read(conversations=[{**question, **mask}, answer])) == [("What?", "That.")]  # no question is learnt
    assert exchanges(read(conversations=[question, {**answer, **dict.fromkeys(mask, 1)}])) == [("What?", "That.")]
    for row in (mask, {"label": False}):
        with pytest.raises(Refusal, match=repr(next(iter(row)))):
            read(conversations=[question, answer], **row)
    assert exchanges(read(conversations=[question, answer], label=0)) == [("What?", "That.")]  # a class


@pytest.mark.parametrize(
    ("raw", "reason", "message"),
    [
        ({"instruction": "q", "output": "a"}, "missing_key", "has 'id', 'instruction', 'output': write its words as"),
        ({"texts": [{"question": "q", "answer": "a"}]}, "missing_key", "{user, assistant}, and one has 'question', 'answer'"),
        ({"messages": openai([{"type": "text", "value": "What?"}], "That.")}, "wrong_type", "'value': 'What"),
        ({"messages": openai("What?", [1, 2])}, "wrong_type", "text or an image, not 1$"),
        ({"txt": "a dog"}, "missing_key", "no image is beside it"),
        ({"txt": "a dog", "jpg": HELD}, "unread_media", "'jpg' may be a picture"),
        ({"file_name": "c.png", "conversations": chat("What?", "A.")}, "unread_media", "image is named 'image'"),
        ({"image": "https://x.org/a.png", "conversations": chat(CAT, "That.")}, "missing_file", "is an address"),
        ({"image": "in/../a.png", "conversations": chat(CAT, "That.")}, "image_path", "or goes up in it"),
        ({"conversations": chat("What?")}, "turns", "no question with its answer"),
        (
            {"x": reduce(lambda inner, _: [inner], range(900), [0]), "conversations": chat("What?", "That.")},
            "malformed_json",
            "nested too deeply",
        ),
        (
            {"images": ["a.png"], "objects": {"bbox": [1]}, "messages": openai("<image>Where?", "<bbox>")},
            "boxes",
            "'objects'",
        ),
    ],
)
def test_a_reason_names_what_is_wrong(raw: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(Refusal, match=message) as refusal:
        read(**raw)
    assert refusal.value.reason == reason


def test_an_absolute_path_within_the_folder_is_relative(tmp_path: Any) -> None:
    raw = {"image": str(tmp_path / "in" / "c.png"), "conversations": chat(CAT, "A cat.")}
    row = understand(1, raw, LIMITS, tmp_path)
    assert row.pictures == ("in/c.png",) and "absolute_path" in row.rules
    with pytest.raises(Refusal, match="leads out"):
        understand(1, raw, LIMITS, tmp_path / "other")


def test_a_caption_answers_a_fixed_question() -> None:
    row = understand(1, {"image": [HELD], "txt": "a dog", "caption": "a dog"}, LIMITS)
    assert exchanges(row) == [(f"<image>\n{DESCRIBE}", "a dog")] and row.ignored == ("caption",)


def test_many_questions_about_a_picture_become_several_samples() -> None:
    pairs = [{"user": f"What is number {n}?", "assistant": f"It is {n}."} for n in range(20)]
    row = read(images=[HELD], texts=pairs)
    assert len(row.samples) > 2 and "several_samples" in row.rules
    assert [answer for _, answer in exchanges(row)] == [f"It is {n}." for n in range(20)]
    for first, *others in row.samples:
        assert first.question.startswith("<image>\n") and not any("<image>" in turn.question for turn in others)
        assert sum(len(turn.question + turn.answer) for turn in (first, *others)) <= 200 + len("<image>\n")


PAIR = {"images": ["a.png", "b.png"]}
SEVERAL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no mark": ({**PAIR, "conversations": chat("Compare.", "No.")}, ["<image>\n<image>\nCompare."]),
    "in their places": (
        {**PAIR, "conversations": chat("Is <image> it?", "No.", "Or\n<image>", "Yes.")},
        ["Is <image> it?", "Or\n<image>"],
    ),
    "pairs": (
        {"images": [HELD, HELD], "texts": [{"user": "What?", "assistant": "A."}, {"user": "<image>And?", "assistant": "B."}]},
        ["<image>\n<image>\nWhat?", "And?"],
    ),
    "image beside the same images": (
        {"image": "a.png", **PAIR, "conversations": chat("<image><image>Compare.", "No.")},
        ["<image><image>Compare."],
    ),
    "parts": (
        {"images": [HELD, HELD], "messages": openai([PARTS[1], PARTS[0], PARTS[1]], "No.")},
        ["<image>What is it?<image>"],
    ),
}


@pytest.mark.parametrize(("raw", "questions"), SEVERAL.values(), ids=SEVERAL)
def test_several_images_stand_at_their_marks(raw: dict[str, Any], questions: list[str]) -> None:
    row = read(**raw)
    assert len(row.pictures) == 2 and [question for question, _ in exchanges(row)] == questions


def parts(*indices: Any) -> list[Any]:
    return openai([*({"type": "image", "index": index} for index in indices), PARTS[0]], "That.")


WHICH: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "parts by index": ({"images": ["a.png", "b.png"], "messages": parts(1, 0)}, ("b.png", "a.png")),
    "parts by a float of pandas": ({"images": ["a.png", "b.png"], "messages": parts(1.0, 0.0)}, ("b.png", "a.png")),
    "one image in two parts": ({"images": ["a.png"], "messages": parts(0, 0)}, ("a.png", "a.png")),
    "parts with an image and without": (
        {"images": ["b.png", "a.png"], "messages": openai([{"type": "image"}, NAMED, PARTS[0]], "That.")},
        ("b.png", "a.png"),
    ),
    "parts without an index": ({"images": ["a.png", "b.png"], "messages": parts(None, None)}, ("a.png", "b.png")),
    "image is the second of images": (
        {"image": "a.png", "images": ["b.png", "a.png"], "conversations": chat("Same?", "No.")},
        ("b.png", "a.png"),
    ),
    "images of one and another": (
        {"image": "a.png", "images": ["b.png"], "conversations": chat("Same?", "No.")},
        ("a.png", "b.png"),
    ),
    "one path in two spellings": (
        {"image": "./x//a.png", "images": ["x/a.png"], "conversations": chat("What?", "A cat.")},
        ("x/a.png",),
    ),
    "the parts' order, not that of images": (
        {
            "images": ["a.png", "b.png"],
            "messages": openai([{"type": "image", "image": "b.png"}, {"type": "image", "image": "a.png"}, PARTS[0]], "That."),
        },
        ("b.png", "a.png"),
    ),
    "null where marks say which": (
        {"images": [None, "b.png"], "conversations": chat("<image>\nWhat?", "A cat.")},
        ("b.png",),
    ),
}


@pytest.mark.parametrize(("raw", "pictures"), WHICH.values(), ids=WHICH)
def test_which_images_are_meant_and_in_which_order(raw: dict[str, Any], pictures: tuple[str, ...]) -> None:
    assert read(**raw).pictures == pictures


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"images": ["b.png"], "messages": openai([{"type": "image"}, NAMED, PARTS[0]], "That.")}, "which is meant"),
        (
            {"images": ["b.png"], "messages": [*openai("<image> is?", "It."), *openai([NAMED, PARTS[0]], "That.")]},
            "which is meant",
        ),
        ({"images": ["a.png", "b.png"], "messages": parts(1, 1)}, "'index'"),
        ({"images": ["a.png", "b.png"], "messages": parts(0, 2)}, "'index'"),
        ({"images": ["a.png", "b.png"], "messages": parts(None, 0)}, "'index'"),
        ({"images": ["a.png", "b.png"], "messages": parts("0", "1")}, "'index'"),
        ({"images": [None, "b.png"], "conversations": chat("Compare the two.", "No.")}, "'images' holds null"),
        ({"image": ["a.png", {"bytes": None, "path": None}], "conversations": chat("Compare.", "No.")}, "'image' holds null"),
    ],
)
def test_images_of_which_none_knows_which_is_meant_are_refused(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words) as refusal:
        read(**raw)
    assert refusal.value.reason == "image_marks"
    assert read(image=[None], images=[{"bytes": None, "path": None}], conversations=chat("What?", "That.")).kind == "text"


def test_a_null_among_images_is_counted() -> None:
    assert "null beside 1 image" in read(images=[None, "b.png"], conversations=chat(CAT, "A cat.")).rules["null_image"]


def test_images_of_two_keys_that_are_joined_are_counted() -> None:
    row = read(image="a.png", images=["b.png", "c.png"], conversations=chat("Same?", "No."))
    assert row.rules["joined_images"] == "2 of another key were put after the first 1"
    assert "joined_images" not in read(image="b.png", images=["a.png", "b.png"], conversations=chat("Same?", "No.")).rules


def test_one_image_opens_its_question_in_whatever_turn() -> None:
    row = read(image="c.png", conversations=chat("Hello?", "Hello.", "What is it?\n<image>", "A cat."))
    assert row.pictures == ("c.png",) and exchanges(row) == [("Hello?", "Hello."), (CAT, "A cat.")]


@pytest.mark.parametrize(
    ("question", "moved"),
    [("Is it left of <image> here?", True), ("What?<image>", True), ("<image>What?", False), (" <image> What?\n", False)],
)
def test_an_only_mark_that_is_moved_is_counted(question: str, moved: bool) -> None:
    row = read(image="c.png", conversations=chat("Hello?", "Hello.", question, "A cat."))
    assert exchanges(row)[1][0].startswith("<image>\n") and ("image_moved" in row.rules) == moved
    assert "image_moved" not in read(image="c.png", system="Be brief.", conversations=chat(CAT, "A cat.")).rules
    assert not moved or repr(question) in row.rules["image_moved"]


def test_turns_that_are_cut_take_their_images_with_them() -> None:
    row = read(images=["a.png", "b.png"], conversations=chat("<image>What?", "A.", "<image>And?", "x" * 195))
    assert row.pictures == ("a.png",) and exchanges(row) == [("<image>What?", "A.")] and "cut_at_turn" in row.rules


def test_a_long_conversation_keeps_its_first_turns() -> None:
    row = read(conversations=chat(*[f"{'word ' * 10}{n}" for n in range(12)]))
    assert row.samples == (tuple(Turn(f"{'word ' * 10}{n}", f"{'word ' * 10}{n + 1}") for n in (0,)),)
    assert "1 of 6 turns" in row.rules["cut_at_turn"]
    with pytest.raises(Refusal, match="201 characters"):
        read(conversations=chat("x", "y" * 200))


def test_a_second_conversation_is_refused_if_it_says_something_else() -> None:
    assert exchanges(read(image="c.png", conversations=chat(CAT, "A cat."), messages=openai(CAT, "A cat."))) == [
        (CAT, "A cat.")
    ]
    assert exchanges(read(image="c.png", conversations=chat(CAT, "A cat."), texts=["read off the image"])) == [(CAT, "A cat.")]
    with pytest.raises(Refusal, match="two conversations, 'messages' beside 'conversations'"):
        read(image="c.png", conversations=chat(CAT, "A cat."), messages=openai(CAT, "A dog."))


@pytest.mark.parametrize("question", ["cat.jpg", " in/cat_1.png", "https://host/cat.webp?size=2\n"])
def test_a_question_that_is_the_name_of_a_picture_is_none(question: str) -> None:
    with pytest.raises(Refusal, match="another code's mark") as refusal:
        read(conversations=chat(question, "A cat."))
    assert refusal.value.reason == "image_marks"
    assert exchanges(read(conversations=chat(f"What is {question.strip()}", "A file."))) == [
        (f"What is {question.strip()}", "A file.")
    ]


KEYS = ("image_base64_str", "img_b64", "image_1_path", "imageUrl", "image_file_name", "image_src", "screenshot", "jpg")
MARKS = (
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|image|>",
    "<ImageHere>",
    "<img><IMG_CONTEXT></img>",
    "[IMG]",
    "[image 1]",
    "{image}",
)
HIDDEN: dict[str, tuple[str, dict[str, Any]]] = {
    "fewer marks than images": ("image_marks", {"images": ["a.png", "b.png"], "conversations": chat(CAT, "A cat.")}),
    "more marks than images": ("image_marks", {"image": "a.png", "conversations": chat(f"<image>{CAT}", "A cat.")}),
    "boxes of one of several": (
        "boxes",
        {"images": ["a.png", "b.png"], "conversations": [{**chat("What?")[0], "boxes": [[0, 0, 1, 1]]}, *chat("", "A.")[1:]]},
    ),
    "another name": ("unread_media", {"img": "a.png"}),
    "bytes under another name": ("unread_media", {"thing": HELD}),
    "a second one under another name": ("unread_media", {"image": HELD, "image_1": HELD}),
    "a path": ("unread_media", {"image_path": "a.png"}),
    "an id": ("unread_media", {"image_id": 33471}),
    "its content as text": ("unread_media", {"thing": PNG}),
    **{f"the key {key}": ("unread_media", {key: "x"}) for key in KEYS},
    "a number of them": ("unread_media", {"num_images": 1}),
    "that there is one": ("unread_media", {"has_image": True}),
    "two addresses beside one image": ("unread_media", {"image": "a.png", "image_urls": ["a.png", "b.png"]}),
    "pairs of a map": ("unread_media", {"meta": [("k", b"x")]}),
    "an address": ("unread_media", {"url": "https://x.org/a.jpg?size=3"}),
    "within another key": ("unread_media", {"meta": {"files": ["x/a.webp"]}}),
    "a data URL within another key": ("unread_media", {"meta": "data:image/png;base64,AA"}),
    "a sound": ("unread_media", {"audio": "a.wav"}),
    "a video": ("video", {"video": "a.mp4"}),
    **{f"the key {key}": ("video", {key: "x"}) for key in ("vid", "mp4", "video_features", "video_dir")},
    **{
        f"the key {key}": ("unread_media", {key: "x"}) for key in ("pdf", "imgs_dir", "image_folder", "image_embeddings", "mp3")
    },
    "a sound as numbers": ("unread_media", {"speech": {"array": [0.5], "sampling_rate": 16000}}),
    "frames": ("video", {"frames": ["1", "2"]}),
    "a video in a tar file": ("video", {".mp4": HELD}),
    "a member of a tar file": ("unread_media", {".heic": HELD}),
    "a turn's own": ("unread_media", {"conversations": [{**chat("What?")[0], "image": "a.png"}, *chat("", "That.")[1:]]}),
    "a video part": (
        "video",
        {"conversations": None, "messages": openai([PARTS[0], {"type": "video", "video": "a.mp4"}], "That.")},
    ),
    "Qwen-VL's mark": ("image_marks", {"conversations": chat("Picture 1: <img>a.png</img>\nWhat?", "That.")}),
    **{f"{mark} before a question": ("image_marks", {"conversations": chat(f"{mark}What?", "That.")}) for mark in MARKS},
    "<video> before a question": ("video", {"conversations": chat("<video>What?", "That.")}),
    "another mark after it": ("image_marks", {"image": "a.png", "conversations": chat("What?<image_1>", "That.")}),
    "LLaVA-Video's mark": ("video", {"conversations": chat("<video>\nWhat?", "That.")}),
}


@pytest.mark.parametrize(
    "question",
    [
        "<|begin_of_image|><|image|><|end_of_image|>\nWhat?",
        "<image_1> <image_2>\nCompare.",
        "<__media__>\nWhat?",
        "<im_patch><im_patch>\nWhat?",
        "<point>\nWhat is this?",
        "<speech>\nWhat is said?",
        "![](c.png)\nWhat?",
        "What?\n![a cat](https://x.org/c.png)",
        "See ![](data:image/png;base64,AAAA)\nWhat?",
        "data:image/png;base64,AAAA",
        f"{PNG}{PNG}\nWhat?",
        '[{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "What?"}]',
        "[{'type': 'image'}, {'type': 'text', 'text': 'What?'}]",
        '[{"type": "text", "text": "What?"}]',
    ],
)
def test_a_medium_within_the_words_of_a_question_is_refused(question: str) -> None:
    with pytest.raises(Refusal, match="a question holds") as refusal:
        read(conversations=chat(question, "That."))
    assert refusal.value.reason == "image_marks"


def test_a_question_of_many_blank_lines_is_looked_through_once() -> None:
    """Two minutes, as it was looked through again from each line."""
    question = "\n" * 20_000
    with pytest.raises(Refusal, match="20,011 characters"):
        read(image="a.png", conversations=chat(f"What?{question}{PNG[:3]}", "Yes"))
    with pytest.raises(Refusal, match="a question holds"):
        read(conversations=chat(f"What?{question} {PNG}", "Yes."))


@pytest.mark.parametrize(
    "question", ["A <ImageHere>; B <ImageHere>. Same?", "This <|vision_start|><|image_pad|><|vision_end|>?"]
)
def test_another_mark_among_words_is_not_passed_over_where_no_mark_of_ours_places_the_images(question: str) -> None:
    with pytest.raises(Refusal, match="a question holds") as refusal:
        read(images=["a.png", "b.png"][: question.count(";") + 1], conversations=chat(question, "Yes."))
    assert refusal.value.reason == "image_marks"
    assert exchanges(read(image="a.png", conversations=chat(f"<image>\n{question}", "Yes."))) == [
        (f"<image>\n{question}", "Yes.")
    ]


@pytest.mark.parametrize(("reason", "raw"), HIDDEN.values(), ids=HIDDEN)
def test_what_a_model_would_have_to_see_is_never_left_out(reason: str, raw: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as refusal:
        read(**{"conversations": chat("What is it?", "A cat."), **raw})
    assert refusal.value.reason == reason


BESIDE = {"image": "x/cat.png", "conversations": chat(CAT, "A cat.")}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("later", "dog.png"),
        ("image_path_2", "dog.png"),
        ("left_path", "dog.png"),
        ("depth", {"file": "cat_depth.png"}),
        ("depths", [{"file": "cat_depth.png"}]),
        ("masks", ["x/cat_1.png", "x/cat_2.png"]),
        ("paths", ["x/cat.png", "dog.png"]),
        ("frames_path", ["0.png"]),
        ("video_path", "walk"),
        ("videoUrl", "https://x.org/walk"),
        ("video_id", "walk"),
        ("audio_path", "bark.wav"),
        ("goal", "data:image/png;base64,AAAA"),
        ("image_url", "data:image/png;base64,AAAA"),
        ("image_path", HELD),
        ("meta", {"source": {"video": "walk"}}),
        ("recording", {"array": [0.5], "sampling_rate": 16000}),
    ],
)
def test_a_medium_beside_the_image_is_refused_by_its_key(key: str, value: object) -> None:
    with pytest.raises(Refusal, match=f"^'{key}' may be") as refusal:
        read(**BESIDE, **{key: value})
    assert refusal.value.reason == ("video" if "video" in key or key in ("meta", "frames_path") else "unread_media")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("url", "https://x.org/photo.jpg"),
        ("coco_url", "https://x.org/000.jpg"),
        ("source", "web/cat.jpg"),
        ("file_name", "cat.jpg"),
        ("imgname", "cat.jpg"),
        ("image_id", "000123"),
        ("image_ids", ["000123"]),
        ("frame_id", "000123"),
        ("original_path", "/data/cat.png"),
        ("any", "x/cat.png"),
        ("info", {"id": 1, "file_name": "cat.jpg", "flickr_url": "https://x.org/1.jpg", "license": 3}),
        ("messages", openai([{"type": "image", "image": "./x/cat.png"}, {"type": "text", "text": "What is it?"}], "A cat.")),
        ("segmentation", {"counts": "aW4b", "size": [3, 4]}),
        ("image_width", 30),
        ("num_images", 1),
        ("caption", "A cat."),
        ("dataset", "coco"),
    ],
)
def test_what_names_the_image_again_or_describes_it_is_an_ignored_key(key: str, value: object) -> None:
    assert read(**BESIDE, **{key: value}).ignored == (key,)


@pytest.mark.parametrize(
    "text",
    [
        '<img src="a.png" alt="x">',
        "this README:\n# Cats\n![cats](c.png)\nIt is short. How",
        "background: url(data:image/png;base64,AAAA);",
        '[{"type": "text", "text": "x"}]',
        "<points>\n<point>3</point>\n</points>",
        "the <video> tag",
        "</s>",
        "see a.png",
        "<|im_end|>",
        "<|image_pad|>",
    ],
)
def test_text_about_pictures_is_text(text: str) -> None:
    row = read(conversations=chat(f"What does {text} mean?", text), model="x", num_images=0, language="en")
    assert row.pictures == () and row.ignored == ("model", "num_images", "language")
