"""Teacher-forced scores against transformers' own loss and a plain sum over the vocabulary, sample by sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from components.dataset.shards import Sample, Samples, Turn
from components.errors import ModelError
from components.evaluate.generate import questions
from components.evaluate.likelihood import kl_per_token, likelihoods, nats_per_token
from components.models.collate import Collator
from components.models.load import Loaded, load
from components.models.template import Template
from components.records.evaluate import Likelihood
from components.records.paths import DATASET, MODELS


@pytest.fixture
def models(workplace: object) -> tuple[Loaded, Loaded, Samples]:
    return load(MODELS / "teachers/small", "cpu"), load(MODELS / "teachers/base", "cpu"), Samples(DATASET, "test")


@torch.no_grad()
def plainly(loaded: Loaded, sample: Sample) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Log-probabilities (N, V) at the rows that predict the reference, its tokens (N,), and transformers' own mean loss."""
    batch = Collator(loaded.processor, Template(""), 999, train=True)([sample])
    labels = batch.input_ids.masked_fill(~batch.response, -100)
    out = loaded.model(input_ids=batch.input_ids, pixel_values=batch.pixel_values, labels=labels)
    positions = batch.response[0].nonzero()[:, 0]
    return out.logits[0, positions - 1].double().log_softmax(-1), batch.input_ids[0, positions], float(out.loss)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_nats_and_kl_are_those_of_one_sample_at_a_time(models: tuple[Loaded, Loaded, Samples], batch_size: int) -> None:
    student, teacher, samples = models
    rows = questions(samples)
    forced = likelihoods(student, samples, rows, Template(""), batch_size, "tests", teacher)
    assert [item.id for item in forced] == [samples[row].id for row in rows]
    for row, item in zip(rows, forced, strict=True):
        log_q, tokens, loss = plainly(student, samples[row])
        log_p, _, _ = plainly(teacher, samples[row])
        assert item.tokens == len(tokens)
        assert item.nats == pytest.approx(loss * len(tokens), rel=1e-4)
        assert item.nats == pytest.approx(-float(log_q.gather(1, tokens[:, None]).sum()), rel=1e-4)
        assert item.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-3)
    assert nats_per_token(forced) == pytest.approx(sum(item.nats for item in forced) / sum(item.tokens for item in forced))
    assert len({item.tokens for item in forced}) > 1, "or a mean over samples would pass for one over tokens"


def test_a_model_is_no_distance_from_itself_and_the_teacher_has_none(models: tuple[Loaded, Loaded, Samples]) -> None:
    student, _, samples = models
    rows = questions(samples)[:4]
    same = likelihoods(student, samples, rows, Template(""), 4, "tests", student)
    assert kl_per_token(same) == pytest.approx(0, abs=1e-6)
    assert kl_per_token(likelihoods(student, samples, rows, Template(""), 4, "tests")) is None


def test_weights_that_are_not_finite_are_refused_and_not_scored(models: tuple[Loaded, Loaded, Samples]) -> None:
    student, _, samples = models
    with torch.no_grad():
        student.model.get_decoder().norm.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="costs nan nats"):
        likelihoods(student, samples, questions(samples)[:2], Template(""), 2, "tests")


def test_only_the_first_question_counts(models: tuple[Loaded, Loaded, Samples]) -> None:
    student, _, samples = models
    (row, *_) = questions(samples)
    more = replace(samples[row], turns=(*samples[row].turns, Turn("List all.", "one two")))
    alone, first = (likelihoods(student, [sample], [0], Template(""), 1, "tests") for sample in (samples[row], more))
    assert alone == first


def test_means_are_over_tokens() -> None:
    forced = [Likelihood(id="a", tokens=1, nats=4.0, kl=1.0), Likelihood(id="b", tokens=3, nats=0.0, kl=0.0)]
    assert (nats_per_token(forced), kl_per_token(forced)) == (1.0, 0.25)
