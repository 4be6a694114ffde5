"""What is trained on with the tokenizers that people have: the answers and one end each, whatever the texts hold."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from components.dataset.shards import Sample, Turn
from components.models.collate import Collator
from components.models.template import Template
from tests.models.conftest import png
from tests.models.released import PROCESSORS

ANSWERS = (
    "Yes.",
    " Yes.",
    "\nYes.",
    "\n\nYes. \n",
    "\tYes.",
    ":Yes",
    "- a\n- b",
    "42",
    "猫。",
    "🙂👩‍👩‍👧",
    "'s",
    "ing",
    "```x\n```",
)
PLAIN = (
    "</s>",
    "<s>",
    "<|im_end|>",
    "<|im_start|>assistant",
    "<|endoftext|>",
    "<pad>",
    "<eos>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<video>",
)


@cache
def collators(name: str) -> tuple[Collator, Collator]:
    make, style = PROCESSORS[name]
    processor = make()
    training, prompt = (Collator(processor, Template("", style=style), 4096, train=train) for train in (True, False))
    return training, prompt


def trained_answers(collator: Collator, sample: Sample) -> list[str]:
    """Each answer that is trained on, cut at the tokens that end one."""
    batch = collator.text([sample])
    ids = batch.input_ids[0][batch.response[0]]
    ends = (ids == collator.eos_id).nonzero().flatten().tolist()
    assert ends and ends[-1] == len(ids) - 1
    return [collator.tokenizer.decode(part).strip() for part in torch.tensor_split(ids, [end + 1 for end in ends[:-1]])]


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_answers_and_one_end_each_are_trained_on_and_a_prompt_is_a_prefix(name: str, image: bool) -> None:
    training, prompts = collators(name)
    for answers in [*((answer,) for answer in ANSWERS), ("one a", "two b", "three c"), ("same", "same", "same")]:
        turns = tuple(Turn("<image>\nwhat q?" if image and not i else "what q?", answer) for i, answer in enumerate(answers))
        sample = Sample("x", "i" if image else "", "kind", png(3) if image else None, turns)
        ends = training.template.eos
        assert [text.removesuffix(ends) for text in trained_answers(training, sample)] == [answer.strip() for answer in answers]
        batch, prompt = training.text([sample]), prompts.text([sample]).input_ids[0]
        start = int(batch.response[0].int().argmax())
        assert batch.input_ids[0][:start].tolist() == prompt.tolist()


@pytest.mark.parametrize("lookalike", PLAIN)
@pytest.mark.parametrize("name", PROCESSORS)
def test_no_text_opens_or_ends_a_turn(name: str, lookalike: str) -> None:
    training, prompts = collators(name)
    turns = (Turn(f"What does {lookalike} mean?", f"It is {lookalike}, that is"), Turn(f"{lookalike}", f"{lookalike}!"))
    sample = Sample("x", "", "kind", None, turns)
    ends = training.template.eos
    assert [text.removesuffix(ends) for text in trained_answers(training, sample)] == [turn.answer for turn in turns]
    plain = Sample("x", "", "kind", None, tuple(Turn(turn.question.replace(lookalike, "that"), "Yes") for turn in turns))
    special = set(training.tokenizer.all_special_ids)

    def marks(row: Sample) -> int:
        return sum(token in special for token in prompts.text([row]).input_ids[0].tolist())

    assert marks(sample) == marks(plain)
