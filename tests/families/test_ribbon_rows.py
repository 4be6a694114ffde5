"""Ribbon rows against separate stock forwards, one per alternative, in float64: values and gradients, on both routes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from components.align_ti.batch import Batch
from components.align_ti.ribbon import Ribbon, continuation_mask, expanded_mask, plan
from components.models.families import inputs
from components.models.vlm import VLM
from tests.families import toy
from tests.families.table import documented

TITLE = "ribbon rows"


def ribbon(family: str, batch: Batch) -> Ribbon:
    """Two alternatives, words both, at the first response step and every fourth; elsewhere the gold token was drawn."""
    eos = toy.loaded(family).processor.tokenizer.eos_token_id
    draws = batch.input_ids[:, 1:][batch.response[:, 1:]][:, None].repeat(1, 2)
    draws[::4] = torch.randint(40, 280, draws[::4].shape, generator=torch.Generator().manual_seed(0))
    return plan(draws, batch.input_ids, batch.response, eos)


def continued(vlm: VLM, batch: Batch, rows: Ribbon) -> tuple[Tensor, Tensor]:
    hidden, cache = vlm.plain(batch, vlm.features(batch), keep=True)
    return hidden, vlm.continued(cache, rows.tokens, rows.positions, continuation_mask(rows, batch.attention_mask))


def expanded(vlm: VLM, batch: Batch, rows: Ribbon) -> tuple[Tensor, Tensor]:
    mask = expanded_mask(rows, batch.attention_mask)
    hidden = vlm.expanded(batch, vlm.features(batch), rows.tokens, rows.positions, mask)
    T = batch.input_ids.shape[1]
    return hidden[:, :T], hidden[:, T:]


ROUTES = {"continuation": continued, "expanded": expanded}


def alone(family: str, batch: Batch, row: int, tokens: Tensor, answered: Tensor) -> Tensor:
    """(T, V) logits of the stock model for one unpadded sequence of the batch's sample `row`, with its images so far."""
    model = toy.loaded(family).model
    length = len(tokens)
    single = toy.alone(family, row, 1 if batch.pictures[row, :length].max() < batch.pictures[row].max() else None)
    pictures = torch.zeros(1, length, dtype=torch.long)
    pictures[0, : batch.pictures.shape[1]] = batch.pictures[row, :length]
    single = replace(
        single, input_ids=tokens[None], attention_mask=torch.ones(1, length).long(), response=answered[None], pictures=pictures
    )
    logits: Tensor = model(
        input_ids=single.input_ids,
        attention_mask=single.attention_mask,
        pixel_values=single.pixel_values,
        **inputs(model, single),
    ).logits[0]
    return logits


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def check(family: str) -> str:
    vlm, batch = VLM(toy.loaded(family).model), toy.batch(family)
    rows = ribbon(family, batch)
    stream = torch.Generator().manual_seed(1)
    logits, weights = [], []
    for b, e in rows.valid.nonzero().tolist():
        position = int(rows.positions[b, e])
        tokens = torch.cat([batch.input_ids[b, :position], rows.tokens[b, e : e + 1]])
        answered = torch.cat([batch.response[b, :position], torch.tensor([True])])
        logits.append(alone(family, batch, b, tokens, answered)[-1])
        weights.append(torch.randn(logits[-1].shape, generator=stream, dtype=torch.float64))
    expected = torch.stack(logits)
    direction = torch.stack(weights)
    slopes = gradients(vlm.model, (expected * direction).sum())
    works = []
    for name, route in ROUTES.items():
        _, hidden = route(vlm, batch, rows)
        actual = vlm.head(hidden[rows.valid])
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        actual_slopes = gradients(vlm.model, (actual * direction).sum())
        for key, slope in slopes.items():
            torch.testing.assert_close(
                actual_slopes[key], slope, rtol=1e-4, atol=1e-4 * float(slope.abs().max()) + 1e-9, msg=key
            )
        works.append(name)
    return ", ".join(works)


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_equal_separate_forwards(family: str) -> None:
    assert check(family) == documented(family, TITLE)


@pytest.mark.parametrize("family", toy.FAMILIES)
@pytest.mark.parametrize("route", ROUTES)
def test_gold_rows_are_those_of_the_stock_forward(family: str, route: str) -> None:
    vlm, batch = VLM(toy.loaded(family).model), toy.batch(family)
    with torch.no_grad():
        hidden, _ = ROUTES[route](vlm, batch, ribbon(family, batch))
        for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
            expected = alone(family, batch, row, batch.input_ids[row, :length], batch.response[row, :length])
            torch.testing.assert_close(vlm.head(hidden[row, :length]).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_an_alternative_may_be_the_image_token(family: str) -> None:
    """A student may well draw it, and then it is a word like any other."""
    vlm, batch = VLM(toy.loaded(family).model), toy.batch(family)
    rows = ribbon(family, batch)
    rows = replace(rows, tokens=torch.full_like(rows.tokens, int(batch.input_ids[batch.visual][0])))
    with torch.no_grad():
        first, second = (route(vlm, batch, rows)[1][rows.valid] for route in ROUTES.values())
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
