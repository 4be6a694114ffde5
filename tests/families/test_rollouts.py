"""What a student writes over its cache, from prompts padded on the left, is what the plain pass that trains on it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from components.align_ti.batch import predicting
from components.config.study import Rollouts as Asked
from components.distill.rollouts import Rollouts
from components.distill.sampler import Sampler
from components.models.load import load
from components.models.vlm import VLM
from tests.families import toy


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_each_token_is_the_likeliest_of_the_plain_pass(family: str) -> None:
    student, samples = load(toy.folder(family, 2, 2), "cpu"), [*toy.SAMPLES, *toy.SAMPLES[:1]]
    collator = toy.collator(student.model.config.model_type)
    asked = Asked(share=0.7, temperature=0.0, top_p=None, max_new_tokens=5, reuse=1)
    order = Sampler([0, 1, 2, 3, 4], 5, seed=2)
    listed: Any = samples
    made = Rollouts(asked, student, collator, listed, order, student.vocabulary, Accelerator(cpu=True))
    pairs = order.batch(0)
    written = made.written(pairs)
    assert 2 < len(written) < 5
    batch = collator([samples[i] for _, i in pairs], [written.get(key) for key, _ in pairs])
    view = VLM(student.model)
    with torch.no_grad():
        hidden, _ = view.plain(batch, view.features(batch), keep=False)
    rows = predicting(batch.response)
    likeliest = torch.zeros_like(batch.input_ids)
    likeliest[rows] = view.head(hidden[rows]).masked_fill(made.writer.barred, float("-inf")).argmax(-1)
    for row, (key, _) in enumerate(pairs):
        if key in written:
            assert likeliest[row][rows[row]].tolist() == written[key]
