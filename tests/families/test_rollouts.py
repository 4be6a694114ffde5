"""What a student writes over its cache, from prompts padded on the left, is what the plain pass that trains on it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from components.align_ti.batch import predicting
from components.config.study import Rollouts as RolloutSettings
from components.dataset.shards import Sample, Turn
from components.distill.rollouts import Rollouts
from components.distill.sampler import Sampler
from components.models.load import Loaded, load
from components.models.vlm import VLM
from components.models.writing import Writer
from tests.families import toy

FEW = range(20, 23)  # tokens that may be drawn, so that most answers end


def predictions(student: Loaded, samples: list[Sample], written: Any) -> tuple[list[list[int]], list[Tensor]]:
    """Response tokens of each sample, and the logits (rows, V) that predict them, of the pass that trains on `written`."""
    batch = toy.collator(student.model.config.model_type)(samples, written)
    view = VLM(student.model)
    with torch.no_grad():
        hidden, _ = view.plain(batch, view.features(batch), keep=False)
    rows = predicting(batch.response)
    logits = [view.head(hidden[row][rows[row]]) for row in range(len(samples))]
    return [ids[response].tolist() for ids, response in zip(batch.input_ids, batch.response, strict=True)], logits


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_each_token_is_the_likeliest_of_the_plain_pass(family: str) -> None:
    student, samples = load(toy.folder(family, 2, 2), "cpu"), [*toy.SAMPLES, *toy.SAMPLES[:1]]
    collator = toy.collator(student.model.config.model_type)
    rollout_settings = RolloutSettings(share=0.7, temperature=0.0, top_p=None, max_new_tokens=5, reuse=1)
    order = Sampler([0, 1, 2, 3, 4], 5, seed=2)
    listed: Any = samples
    rollouts = Rollouts(rollout_settings, student, collator, listed, order, student.vocabulary, Accelerator(cpu=True))
    pairs = order.batch(0)
    written = rollouts.generate(pairs)
    assert 2 < len(written) < 5
    responses, logits = predictions(student, [samples[i] for _, i in pairs], [written.get(key) for key, _ in pairs])
    for row, (key, _) in enumerate(pairs):
        if key in written:
            assert responses[row] == [token for answer in written[key] for token in answer]
            assert logits[row].masked_fill(rollouts.writer.barred, float("-inf")).argmax(-1).tolist() == responses[row]


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_each_answer_follows_those_before_it(family: str) -> None:
    later = replace(
        toy.SAMPLES[3],
        turns=(Turn("<image>\nwhat digit ?", "red"), Turn("is <image> red ?", "no")),
        more=toy.SAMPLES[3].more[:1],
    )
    student, samples = load(toy.folder(family, 2, 2), "cpu"), [*toy.SAMPLES, *toy.SAMPLES[2:], *[later] * 4]
    collator = toy.collator(student.model.config.model_type)
    writer = Writer(student, collator, 12, 1.0, None, student.vocabulary)
    writer.barred[:] = True
    writer.barred[[collator.eos_id, *FEW]] = False
    written = writer.write(samples, range(len(samples)))
    assert all(0 < len(answers) <= len(sample.turns) for answers, sample in zip(written, samples, strict=True))
    assert max(map(len, written[:6])) == 2
    assert max(map(len, written[6:])) == (1 if family == "llava_onevision" else 2), (
        "there another image undoes the tiles of the first"
    )
    assert all(answer.tokens[-1] == collator.eos_id for answers in written for answer in answers[:-1])
    responses, logits = predictions(student, samples, [[answer.tokens for answer in answers] for answers in written])
    for answers, tokens, of_row in zip(written, responses, logits, strict=True):
        assert tokens == [token for answer in answers for token in answer.tokens]
        log_probs = of_row.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        sums = [float(part.sum()) for part in log_probs.split([len(answer.tokens) for answer in answers])]
        assert sums == pytest.approx([answer.log_prob for answer in answers], rel=1e-4)
