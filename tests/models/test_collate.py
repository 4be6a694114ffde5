import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import normalizers

from components.dataset.shards import Turn
from components.errors import DataError, ModelError
from components.models import collate
from components.models.collate import Collator, check_special_tokens
from components.models.image_processor import decode_first_image, visual_tokens
from components.models.template import Template
from tests.models.conftest import NV, WORDS, bpe_processor, sample, word_processor

TEMPLATE = Template("")
TWO_TURNS = sample(("what digit is at a1 ?", "one"), ("list the grid .", "red one, red two"))
PROCESSORS = {"words": word_processor(), "bpe": bpe_processor()}


def strings(processor, ids) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(ids)


def test_masks_equal_a_hand_written_tokenisation() -> None:
    processor = PROCESSORS["words"]
    batch = Collator(processor, TEMPLATE, 64, train=True)([TWO_TURNS, sample(("what ?", "no"), name="s1")])
    eos = "<|endoftext|>"
    first = [("USER:", "")] + [("<image>", "v")] * 4 + [("\n", "i")]
    first += [(w, "i") for w in ["what", "digit", "is", "at", "a1", "?", "ASSISTANT:"]] + [("one", "r"), (eos, "r")]
    first += [(w, "i") for w in ["USER:", "list", "the", "grid", ".", "ASSISTANT:"]]
    first += [(w, "r") for w in ["red", "one", ",", "red", "two"]] + [(eos, "r")]
    second = [("USER:", "")] + [("<image>", "v")] * 4 + [("\n", "i"), ("what", "i"), ("?", "i"), ("ASSISTANT:", "i")]
    second += [("no", "r"), (eos, "r")]
    second += [("<pad>", "")] * (len(first) - len(second))
    for row, expected in enumerate((first, second)):
        assert strings(processor, batch.input_ids[row]) == [word for word, _ in expected]
        for mask, mark in ((batch.response, "r"), (batch.instruction, "i"), (batch.visual, "v")):
            assert mask[row].tolist() == [mark in kind for _, kind in expected]
        assert batch.attention_mask[row].tolist() == [int(word != "<pad>") for word, _ in expected]


def test_each_of_several_images_stands_at_its_mark_and_has_its_number() -> None:
    processor = PROCESSORS["words"]
    several = replace(
        sample(("<image> what ?", "no"), ("digit at <image> one ?", "red")),
        more=(sample(name="b").image, sample(name="c").image),
    )
    batch = Collator(processor, TEMPLATE, 64, train=True)([several, TWO_TURNS])
    eos = "<|endoftext|>"
    words = [("USER:", "."), *[("<image>", "1")] * 4, ("\n", "i"), *[("<image>", "2")] * 4, ("\n", "i")]
    words += [
        ("what", "i"),
        ("?", "i"),
        ("ASSISTANT:", "i"),
        ("no", "r"),
        (eos, "r"),
        ("USER:", "i"),
        ("digit", "i"),
        ("at", "i"),
    ]
    words += [*[("<image>", "3")] * 4, ("one", "i"), ("?", "i"), ("ASSISTANT:", "i"), ("red", "r"), (eos, "r")]
    assert strings(processor, batch.input_ids[0][: len(words)]) == [word for word, _ in words]
    assert batch.pictures[0][: len(words)].tolist() == [int(kind) if kind.isdigit() else 0 for _, kind in words]
    for mask, mark in ((batch.response, "r"), (batch.instruction, "i")):
        assert mask[0][: len(words)].tolist() == [mark == kind for _, kind in words]
    assert batch.image_ids == [several.image_id] * 3 + [TWO_TURNS.image_id] and len(batch.pixel_values) == 4
    assert torch.equal(batch.pixel_values[3], batch.pixel_values[0]) and not torch.equal(
        batch.pixel_values[1], batch.pixel_values[2]
    )
    prompt = Collator(processor, TEMPLATE, 64, train=False)([several])
    assert len(prompt.pixel_values) == 2 and torch.equal(prompt.input_ids[0], batch.input_ids[0][: prompt.input_ids.shape[1]])
    assert (
        several.upto(1).more == several.more[:1] and several.upto(2) == several and TWO_TURNS.upto(1).image == TWO_TURNS.image
    )


def test_bpe_masks_decode_to_the_answers() -> None:
    processor = PROCESSORS["bpe"]
    batch = Collator(processor, TEMPLATE, 200, train=True)([TWO_TURNS])
    decode = processor.tokenizer.decode
    assert decode(batch.input_ids[0][batch.response[0]]) == " one<|endoftext|> red one, red two<|endoftext|>"
    text = decode(batch.input_ids[0][batch.instruction[0]])
    assert text == "\nwhat digit is at a1 ? ASSISTANT:USER: list the grid . ASSISTANT:"


@pytest.mark.parametrize("train", [True, False])
def test_rows_of_words_are_the_questions_without_the_templates_own(processor, train: bool) -> None:
    samples = [TWO_TURNS, sample(("what ?", "no"), image=False, name="t")]
    every, words = (Collator(processor, Template("be brief ."), 200, train, rows=rows)(samples) for rows in ("all", "words"))
    assert torch.equal(every.input_ids, words.input_ids) and torch.equal(every.response, words.response)
    assert not (words.instruction & ~every.instruction).any()
    text, nothing = (processor.tokenizer.decode(words.input_ids[row][words.instruction[row]]) for row in (0, 1))
    assert text.replace(" ", "") == "whatdigitisata1?" + "listthegrid." * train
    assert nothing == "", "a sample without an image has no row to look from"


def test_the_teachers_reading_has_the_same_rows() -> None:
    batch = Collator(PROCESSORS["words"], TEMPLATE, 200, train=True, teacher=PROCESSORS["words"], rows="words")([TWO_TURNS])
    assert batch.teacher is not None
    assert torch.equal(batch.teacher.instruction, batch.instruction)


def test_shifted_by_one_the_response_mask_predicts_first_word_to_eos_and_nothing_after(processor) -> None:
    """The mistake docs/method.md warns of: masking unshifted logits drops the first answer token and adds the one after EOS."""
    batch = Collator(processor, TEMPLATE, 200, train=True)([sample(("what ?", "one"), name="a"), TWO_TURNS])
    targets, keep = batch.input_ids[:, 1:], batch.response[:, 1:]
    predicted = targets[0][keep[0]].tolist()
    assert predicted == [*processor.tokenizer.encode(" one"), processor.tokenizer.eos_token_id]
    position = keep[0].nonzero()[0, 0].item()  # the logit that predicts the first answer token ...
    prompt = Collator(processor, TEMPLATE, 200, train=False)([sample(("what ?", "one"))])
    assert position == prompt.input_ids.shape[1] - 1  # ... is the one of the prompt's last token
    assert not batch.response[:, 0].any()


words = st.lists(st.sampled_from([w for w in WORDS if w.isalnum()]), min_size=1, max_size=5).map(" ".join)


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(PROCESSORS)),
    st.lists(st.tuples(words, words), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 9),
)
def test_masks_hold_for_any_turns(kind: str, turns: list[tuple[str, str]], image: bool, seed: int) -> None:
    processor, eos = PROCESSORS[kind], "<|endoftext|>"
    tokenizer = processor.tokenizer
    other = sample(*turns[:1], image=random.Random(seed).random() < 0.5, name="other")
    batch = Collator(processor, TEMPLATE, 400, train=True)([sample(*turns, image=image), other])
    ids, response, instruction, visual = batch.input_ids[0], batch.response[0], batch.instruction[0], batch.visual[0]
    assert not (response & instruction).any() and not (response & visual).any() and not (instruction & visual).any()
    assert not ((response | instruction | visual) & (batch.attention_mask[0] == 0)).any()
    assert visual.sum() == (NV if image else 0)
    answers = [text.strip() for text in tokenizer.decode(ids[response]).split(eos)]
    assert answers == [answer for _, answer in turns] + [""]
    instructions = tokenizer.decode(ids[instruction], clean_up_tokenization_spaces=False)
    assert all(question in instructions for question, _ in turns) if image else not instruction.any()
    if image:  # every token from the image on is exactly one of the three
        start = visual.nonzero()[0, 0]
        assert ((response | instruction | visual) == (batch.attention_mask[0] == 1))[start:].all()


def test_evaluation_batches_are_prompts_padded_left(processor) -> None:
    samples = [TWO_TURNS, sample(("what ?", "no"), name="s1")]
    train = Collator(processor, TEMPLATE, 200, train=True)(samples)
    batch = Collator(processor, TEMPLATE, 200, train=False)(samples)
    assert not batch.response.any()
    assert batch.attention_mask[:, -1].all() and not batch.attention_mask[1, 0]
    for row in range(2):
        prompt = batch.input_ids[row][batch.attention_mask[row] == 1]
        assert torch.equal(prompt, train.input_ids[row][: len(prompt)])
        assert train.response[row][len(prompt)] and not train.response[row][: len(prompt)].any()


def test_images_are_those_of_the_samples_that_have_one(processor) -> None:
    samples = [sample(("what ?", "no"), image=False, name="t"), TWO_TURNS, sample(("what ?", "no"), name="s7"), TWO_TURNS]
    collator = Collator(processor, TEMPLATE, 200, train=True)
    batch = collator(samples)
    assert batch.image_ids == [samples[1].image_id, samples[2].image_id, samples[1].image_id]
    direct = processor.image_processor(images=[decode_first_image(samples[i]) for i in (1, 2, 1)], return_tensors="pt")
    assert torch.equal(batch.pixel_values, direct["pixel_values"])
    assert torch.equal(collator(samples).pixel_values, batch.pixel_values)  # from the cache
    assert batch.visual.any(1).tolist() == [False, True, True, True]
    assert collator(samples[:1]).pixel_values is None


def test_cache_never_outgrows_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    collator = Collator(PROCESSORS["words"], TEMPLATE, 200, train=True)
    samples = [sample(("what ?", "no"), name=f"s{i}") for i in range(4)]
    image_bytes = 3 * 16 * 16 * 4  # bytes of pixels
    monkeypatch.setattr(collate, "PIXEL_CACHE_BYTES", 2 * image_bytes)
    pixels = collator(samples).pixel_values
    assert collator._processed_bytes == 2 * image_bytes and len(collator._processed) == 2
    assert torch.equal(collator(samples).pixel_values, pixels)


def test_model_reads_the_batch(processor) -> None:
    from tests.models.conftest import tiny_llava

    batch = Collator(processor, TEMPLATE, 200, train=True)([TWO_TURNS, sample(("what ?", "no"), image=False, name="t")]).to(
        "cpu"
    )
    model = tiny_llava(processor)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values).logits
    assert logits.shape == (*batch.input_ids.shape, len(processor.tokenizer)) and torch.isfinite(logits).all()


BAD = {
    "no image for its mark": (replace(TWO_TURNS, image=None), "must stand 0 time"),
    "no mark for its image": (replace(sample(("what ?", "no"), image=False), image=TWO_TURNS.image), "must stand 1 time"),
    "two marks for an image": (sample(("what ?", "no"), ("<image> what ?", "no")), "stands 2 time"),
    "mark in an answer": (sample(("what ?", "<image>"), image=False), "1 in its answers"),
    "empty answer": (sample(("what ?", "  ")), "an answer is empty"),
    "one empty answer of two": (sample(("what ?", "no"), ("what ?", "")), "an answer is empty"),
    "no turns": (replace(TWO_TURNS, turns=()), "no turns"),
    "broken image": (replace(TWO_TURNS, image=TWO_TURNS.image[:60]), "does not decode"),
    "too long": (sample(("what ? " * 60, "no")), "max_length is 100"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_samples_are_refused_by_name(case: str) -> None:
    bad, message = BAD[case]
    with pytest.raises(DataError, match="s0") as refusal:
        Collator(PROCESSORS["words"], TEMPLATE, 100, train=True)([sample(("what ?", "no"), name="fine"), bad])
    assert message in str(refusal.value)


@pytest.mark.parametrize("lookalike", ["<|endoftext|>", "<pad>", "<image >", "a<|endoftext|><|endoftext|>"])
def test_what_looks_like_a_special_token_is_plain_text(processor, lookalike: str) -> None:
    collator, prompts = (Collator(processor, TEMPLATE, 200, train=train) for train in (True, False))
    odd = sample((f"what {lookalike} ?", f"no {lookalike} yes"), ("is it ?", "yes"))
    batch = collator([odd, TWO_TURNS])
    tokenizer, ids = processor.tokenizer, batch.input_ids[0]
    assert ids[batch.response[0]].tolist().count(tokenizer.eos_token_id) == 2
    assert tokenizer.pad_token_id not in ids[batch.attention_mask[0].bool()]
    assert batch.visual[0].sum() == NV
    prompt = prompts.text([odd]).input_ids[0]
    start = int(batch.response[0].int().argmax())
    assert ids[:start].tolist() == prompt.tolist() and tokenizer.eos_token_id not in prompt
    assert torch.equal(batch.input_ids[1], collator([TWO_TURNS, odd]).input_ids[0])
    if processor is PROCESSORS["bpe"]:
        assert lookalike in tokenizer.decode(prompt) and lookalike in tokenizer.decode(ids[batch.response[0]])


@pytest.mark.parametrize("answer", [" no", "\n\nno", "no \n", "\tno"])
def test_white_space_around_an_answer_is_no_part_of_it(processor, answer: str) -> None:
    collator = Collator(processor, TEMPLATE, 200, train=True)
    assert torch.equal(collator([sample(("what ?", answer))]).input_ids, collator([sample(("what ?", "no"))]).input_ids)


def test_odd_but_sound_samples_have_a_defined_batch(processor) -> None:
    """What of them counts in the loss: tests/align_ti/test_step.py, odd batches."""
    collator = Collator(processor, TEMPLATE, 200, train=True)
    texts = collator([sample(("what ?", "no"), image=False, name=name) for name in ("a", "b")])
    assert texts.pixel_values is None and texts.image_ids == [] and not texts.visual.any() and not texts.instruction.any()
    assert texts.response.any(1).all()
    image_only = collator([replace(TWO_TURNS, turns=(Turn("<image>", "no"),))])
    assert image_only.visual.sum() == NV
    instruction = processor.tokenizer.decode(image_only.input_ids[0][image_only.instruction[0]])
    assert instruction.strip() == "ASSISTANT:", "what follows the image is then the template's own words"
    assert image_only.response.sum() >= 2  # an answer and its EOS


def test_answers_of_which_the_tokenizer_keeps_nothing_are_refused() -> None:
    processor = word_processor()
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("nil", "")
    with pytest.raises(DataError, match="s0: an answer has no response tokens"):
        Collator(processor, TEMPLATE, 100, train=True)([sample(("what ?", "nil"))])


def test_visual_tokens_are_counted_by_the_processor_itself(processor) -> None:
    assert visual_tokens(processor) == NV
    text = processor(images=Image.new("RGB", (50, 20)), text="<image>", return_tensors="pt")
    assert (text["input_ids"] == processor.image_token_id).sum() == NV


def test_varying_visual_tokens_have_no_number() -> None:
    processor = word_processor()
    processor.image_processor.size = {"shortest_edge": 16}
    assert visual_tokens(processor) is None
    processor.patch_size = None
    with pytest.raises(ModelError, match="is incomplete"):
        visual_tokens(processor)


def test_special_tokens_are_checked() -> None:
    processor = word_processor()
    check_special_tokens(processor)
    processor.tokenizer.pad_token = "<|endoftext|>"
    with pytest.raises(ModelError, match="padding and EOS are the same"):
        Collator(processor, TEMPLATE, 100, train=True)
    processor.tokenizer.pad_token = None
    with pytest.raises(ModelError, match="no padding token"):
        check_special_tokens(processor)
    processor = word_processor()
    processor.image_token = "<picture>"
    with pytest.raises(ModelError, match="image token '<picture>' is missing"):
        check_special_tokens(processor)
    with pytest.raises(ModelError, match="not a processor of images and text"):
        check_special_tokens(processor.tokenizer)
