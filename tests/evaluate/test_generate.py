"""Greedy generation: the answers are the model's own, whatever the batch they were given in."""

from __future__ import annotations

import logging
import random
import warnings

import pytest
import torch
from transformers import GenerationConfig

from components.config.evaluate import EvaluateSettings
from components.config.load import load_settings
from components.dataset.shards import Samples
from components.errors import DataError
from components.evaluate.generate import answers, questions
from components.models.collate import Collator
from components.models.load import Loaded, load
from components.models.template import Template
from tests.families import toy

TEMPLATE = Template("")
NEW_TOKENS = 6


def settings(batch_size: int, max_new_tokens: int = NEW_TOKENS) -> EvaluateSettings:
    return load_settings().evaluate.model_copy(update={"batch_size": batch_size, "max_new_tokens": max_new_tokens})


def generate(loaded: Loaded, samples: Samples, rows: list[int], batch_size: int, max_new_tokens: int = NEW_TOKENS) -> list[str]:
    return answers(loaded, samples, rows, TEMPLATE, 64, settings(batch_size, max_new_tokens), "tests")


@pytest.fixture(scope="module")
def rows(samples: Samples) -> list[int]:
    shuffled = questions(samples)
    random.Random(0).shuffle(shuffled)
    return shuffled


@pytest.fixture(scope="module")
def one_by_one(loaded: Loaded, samples: Samples, rows: list[int]) -> list[str]:
    return generate(loaded, samples, rows, batch_size=1)


def test_captions_are_not_asked(samples: Samples) -> None:
    kinds = [samples[row].kind for row in questions(samples)]
    assert len(kinds) == 32 and "caption" not in kinds
    assert samples.kinds == [sample.kind for sample in samples]


class Captions(list[str]):
    def __init__(self) -> None:
        super().__init__(["caption"] * 2)
        self.kinds = self


def test_captions_alone_are_nothing_to_score() -> None:
    with pytest.raises(DataError, match="none of the split's 2 samples is a question"):
        questions(Captions())  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [5, 32])
def test_batched_answers_equal_answers_one_by_one(
    loaded: Loaded, samples: Samples, rows: list[int], one_by_one: list[str], batch_size: int
) -> None:
    assert generate(loaded, samples, rows, batch_size) == one_by_one


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_questions_without_an_image_are_answered_alone_as_beside_others(family: str) -> None:
    """Whatever the family: a batch may hold no image at all."""
    loaded = load(toy.folder(family), "cpu")
    alone, together = (
        answers(loaded, toy.SAMPLES, rows, TEMPLATE, 400, settings(size, 3), "tests") for rows, size in (([1], 1), ([1, 2], 2))
    )
    assert alone == together[:1]


def plainly(loaded: Loaded, samples: Samples, row: int) -> str:
    """argmax of a whole forward pass for every token, until EOS: slow, and plainly greedy."""
    tokenizer = loaded.processor.tokenizer
    batch = Collator(loaded.processor, TEMPLATE, 64, train=False)([samples[row]])
    ids = batch.input_ids
    prompt = ids.shape[1]
    while ids.shape[1] < prompt + NEW_TOKENS and ids[0, -1] != tokenizer.eos_token_id:
        with torch.no_grad():
            logits = loaded.model(input_ids=ids, pixel_values=batch.pixel_values, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, prompt:], skip_special_tokens=True).strip()


def test_answers_equal_a_plain_loop_without_a_cache(
    loaded: Loaded, samples: Samples, rows: list[int], one_by_one: list[str]
) -> None:
    assert [plainly(loaded, samples, row) for row in rows[:8]] == one_by_one[:8]


def test_answers_differ_between_images_and_between_questions(samples: Samples, rows: list[int], one_by_one: list[str]) -> None:
    """Else the tests above would hold for a model that always says the same."""
    by_kind: dict[str, set[str]] = {}
    for row, answer in zip(rows, one_by_one, strict=True):
        by_kind.setdefault(samples[row].kind, set()).add(answer)
    assert min(len(distinct) for distinct in by_kind.values()) > 1
    assert len(set(one_by_one)) > len(one_by_one) / 2


def test_generation_stops_at_eos_and_leaves_no_special_token(loaded: Loaded, samples: Samples, rows: list[int]) -> None:
    """The head is made to prefer EOS: answers are then shorter than the limit, also beside longer ones in their batch."""
    head = loaded.model.get_output_embeddings().weight
    original = head.detach().clone()
    tokenizer = loaded.processor.tokenizer
    with torch.no_grad():
        head[tokenizer.eos_token_id] *= 3
    try:
        generated = generate(loaded, samples, rows, batch_size=32)
        assert generated[:16] == [plainly(loaded, samples, row) for row in rows[:16]]
    finally:
        with torch.no_grad():
            head.copy_(original)
    lengths = {len(tokenizer.tokenize(answer)) for answer in generated}
    assert min(lengths) < max(lengths) <= NEW_TOKENS
    assert not any(token in answer for token in tokenizer.all_special_tokens for answer in generated)


def test_an_answer_is_cut_at_the_limit(loaded: Loaded, samples: Samples, rows: list[int], one_by_one: list[str]) -> None:
    short = generate(loaded, samples, rows, batch_size=8, max_new_tokens=2)
    assert all(long.startswith(cut) for cut, long in zip(short, one_by_one, strict=True)) and short != one_by_one


def test_a_checkpoints_own_sampling_settings_stand_aside(
    loaded: Loaded, samples: Samples, rows: list[int], one_by_one: list[str]
) -> None:
    sampling = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, num_beams=2, max_length=3)
    original, loaded.model.generation_config = loaded.model.generation_config, sampling
    try:
        assert generate(loaded, samples, rows, batch_size=8) == one_by_one
        assert loaded.model.generation_config is sampling
    finally:
        loaded.model.generation_config = original


def test_nothing_warns(loaded: Loaded, samples: Samples, rows: list[int], caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(loaded, samples, rows, batch_size=8)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_a_prompt_that_is_too_long_is_named(loaded: Loaded, samples: Samples, rows: list[int]) -> None:
    with pytest.raises(DataError, match=r"test\d+-exist_at.*max_length is 26"):
        answers(loaded, samples, rows, TEMPLATE, 26, settings(4), "tests")
