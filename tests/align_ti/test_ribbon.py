"""The plan of a ribbon: which rows, how often, which masks; and the draws."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.align_ti.ribbon import (
    LEFT_OUT,
    continuation_mask,
    counted,
    draw,
    draw_distinct,
    expanded_mask,
    fit,
    left_out,
    plan,
    predicting,
    probabilities,
    shuffled,
    step_priorities,
    uniforms,
)
from tests import tiny

SHAPES = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4).filter(
    lambda samples: any(response for _, _, response in samples)
)


def test_positions_that_predict_the_response() -> None:
    """Off by one is the field's favourite mistake: the last prompt token predicts y_1, and EOS predicts nothing."""
    response = torch.tensor([[False, False, True, True, False], [False, True, True, True, True]])
    assert predicting(response).tolist() == [[False, True, True, False, False], [True, True, True, True, False]]


@given(samples=SHAPES, draws=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=80)
def test_plan_accounts_for_every_draw(samples: list[tuple[int, int, int]], draws: int, seed: int) -> None:
    batch = tiny.batch(samples, seed)
    steps = int(batch.response.sum())
    drawn = torch.randint(0, 8, (steps, draws), generator=torch.Generator().manual_seed(seed))  # few tokens: many repeats
    gold_too = torch.rand(steps, draws, generator=torch.Generator().manual_seed(seed + 1)) < 0.3
    gold = batch.input_ids[:, 1:][batch.response[:, 1:]]
    drawn = torch.where(gold_too, gold[:, None], drawn)
    ribbon = plan(drawn, batch.input_ids, batch.response, tiny.EOS)

    expected: Counter[tuple[int, int, int]] = Counter()
    places = [(b, t + 1) for b, t in predicting(batch.response).nonzero().tolist()]
    for (b, position), tokens in zip(places, drawn.tolist(), strict=True):
        expected.update((b, position, token) for token in tokens if token != tiny.EOS)
    actual: Counter[tuple[int, int, int]] = Counter()
    for b, e in ribbon.valid.nonzero().tolist():
        key = (b, int(ribbon.positions[b, e]), int(ribbon.tokens[b, e]))
        assert key not in actual, "equal draws must share a row"
        assert key[2] != int(batch.input_ids[b, key[1]]), "a gold draw needs no row"
        actual[key] = int(ribbon.multiplicity[b, e])
    for b, position in (ribbon.gold > 0).nonzero().tolist():
        actual[b, position, int(batch.input_ids[b, position])] = int(ribbon.gold[b, position])
    assert actual == expected
    assert int(ribbon.counted) == expected.total()


def test_masks_row_by_row() -> None:
    batch = tiny.batch([(1, 2, 3), (0, 1, 2)])
    drawn = torch.arange(20, 20 + 5)[:, None] * torch.ones(1, 2, dtype=torch.long) + torch.tensor([[0, 10]])
    ribbon = plan(drawn, batch.input_ids, batch.response, tiny.EOS)
    B, T = batch.input_ids.shape
    E = ribbon.tokens.shape[1]
    mask = expanded_mask(ribbon, batch.attention_mask)[:, 0]
    for b in range(B):
        for row in range(T):
            real = bool(batch.attention_mask[b, row])
            visible = [c for c in range(row + 1) if bool(batch.attention_mask[b, c])] if real else None
            if real:
                assert mask[b, row].nonzero().flatten().tolist() == visible
        for e in range(E):
            prefix = list(range(int(ribbon.positions[b, e]))) if ribbon.valid[b, e] else []
            assert mask[b, T + e].nonzero().flatten().tolist() == [*prefix, T + e]
    torch.testing.assert_close(continuation_mask(ribbon, batch.attention_mask)[:, 0], mask[:, T:])


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).expand(20_000, 4)
    u = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(draw(p, u).flatten(), minlength=4) / 20_000
    assert (share - p[0]).abs().max() < 0.015  # four standard errors
    assert share[1] == 0


def test_draws_without_replacement_differ_and_follow_the_sequential_distribution() -> None:
    p = torch.tensor([[0.6, 0.3, 0.1]]).expand(20_000, 3)
    pairs = draw_distinct(p.log(), torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0)))
    assert (pairs[:, 0] != pairs[:, 1]).all()
    share = ((pairs[:, 0] == 0) & (pairs[:, 1] == 1)).float().mean()
    assert share == pytest.approx(0.6 * 0.3 / 0.4, abs=0.015)
    with pytest.raises(ValueError, match="draw with replacement"):
        draw_distinct(torch.zeros(1, 2), torch.rand(1, 3))


@pytest.mark.parametrize("top_k", [None, 3, 9])
def test_tokens_of_probability_zero_in_floats_are_drawn_after_those_above_them(top_k: int | None) -> None:
    """At a low temperature one token has all of the mass that float32 can tell."""
    logits = torch.tensor([[-40.0, 0.0, -30.0, -20.0]])
    assert draw_distinct(logits, torch.rand(1, 3), 0.1, top_k).tolist() == [[1, 3, 2]]


def test_extreme_uniforms_draw_possible_tokens() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]])
    u = torch.tensor([[0.0, 1 - 2**-24], [0.0, 1 - 2**-24]])
    assert draw(p, u).tolist() == [[1, 1], [1, 2]]


def test_draws_from_nan_are_tokens_all_the_same() -> None:
    assert int(draw(torch.full((2, 5), float("nan")), torch.rand(2, 3)).max()) < 5


def test_uniforms_belong_to_the_sample_not_to_the_batch() -> None:
    batch = tiny.batch([(1, 2, 3), (0, 1, 2), (1, 3, 4)])
    together = uniforms(batch.response, [7, 8, 9], 4)
    alone = [uniforms(batch.response[i : i + 1], [key], 4) for i, key in enumerate([7, 8, 9])]
    assert torch.equal(together, torch.cat(alone))
    assert len(torch.unique(together)) == together.numel()


LOGITS = st.lists(st.floats(-8, 8), min_size=2, max_size=12).map(lambda x: torch.tensor([x], dtype=torch.float64))


@given(logits=LOGITS, top_p=st.floats(0.01, 0.99))
@settings(max_examples=80)
def test_top_p_keeps_the_smallest_set_that_reaches_it(logits: torch.Tensor, top_p: float) -> None:
    p, truncated = logits.softmax(-1)[0], probabilities(logits, top_p=top_p)[0]
    inside = truncated > 0
    assert float(p[inside].sum()) >= top_p - 1e-12
    assert float(p[inside].sum() - p[inside].min()) < top_p + 1e-12, "without its least likely token it does not reach it"
    assert not (~inside).any() or float(p[inside].min()) >= float(p[~inside].max())
    torch.testing.assert_close(truncated[inside], p[inside] / p[inside].sum())


@given(logits=LOGITS, top_k=st.integers(1, 15), temperature=st.floats(0.3, 3.0))
@settings(max_examples=60)
def test_top_k_and_temperature(logits: torch.Tensor, top_k: int, temperature: float) -> None:
    p, truncated = (logits / temperature).softmax(-1)[0], probabilities(logits, temperature, top_k)[0]
    inside = truncated > 0
    assert int(inside.sum()) == min(top_k, len(p))
    assert float(p[inside].min()) >= float(p.sort(descending=True).values[min(top_k, len(p)) - 1])
    torch.testing.assert_close(truncated[inside], p[inside] / p[inside].sum())


def test_a_high_temperature_makes_the_likeliest_tokens_equal() -> None:
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(20, 30).scatter(1, logits.argsort(descending=True)[:, :5], 0.2)
    torch.testing.assert_close(probabilities(logits, temperature=1e9, top_k=5), expected)


def test_sharpened_probabilities_are_those_of_generate() -> None:
    """transformers' own warpers, in the order that `generate` applies them."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 3
    warped = logits
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.8)):
        warped = warper(None, warped)
    torch.testing.assert_close(probabilities(logits, 0.7, 9, 0.8), warped.softmax(-1))
    torch.testing.assert_close(probabilities(logits), logits.softmax(-1))


def capped(batch, drawn: torch.Tensor, keys: list[int], cap: int) -> torch.Tensor:
    tensors = (batch.input_ids, batch.attention_mask, batch.response)
    return fit(drawn, step_priorities(batch.response, keys), *tensors, tiny.EOS, cap)


@given(samples=SHAPES, draws=st.integers(1, 4), cap=st.integers(1, 30), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_a_capped_ribbon_fits_and_leaves_out_whole_steps_and_no_more_than_it_must(
    samples: list[tuple[int, int, int]], draws: int, cap: int, seed: int
) -> None:
    batch = tiny.batch(samples, seed)
    keys = list(range(seed, seed + len(samples)))
    drawn = torch.randint(0, 8, (int(batch.response.sum()), draws), generator=torch.Generator().manual_seed(seed))
    fitted = capped(batch, drawn, keys, cap)
    out = (fitted == LEFT_OUT).all(1)
    assert torch.equal(fitted[~out], drawn[~out]), "a step keeps all its draws or none"
    ribbon, full = (plan(d, batch.input_ids, batch.response, tiny.EOS) for d in (fitted, drawn))
    gold_lengths = batch.attention_mask.sum(1)
    lengths, full_lengths = gold_lengths + ribbon.valid.sum(1), gold_lengths + full.valid.sum(1)
    assert (ribbon.valid.sum(1)[gold_lengths > cap] == 0).all() and (lengths[gold_lengths <= cap] <= cap).all()
    owner = predicting(batch.response).nonzero()[:, 0]
    for i in range(len(samples)):
        if full_lengths[i] <= cap:
            assert not out[owner == i].any(), "what fits is kept"
        elif gold_lengths[i] <= cap:
            assert out[owner == i].any() and lengths[i] > cap - draws, "the next step in line did not fit"
    assert int(ribbon.counted) == int(((fitted != LEFT_OUT) & (fitted != tiny.EOS)).sum()) == int(counted(fitted, tiny.EOS))
    assert ribbon.steps_left_out == left_out(fitted) == int(out.sum())


def test_what_a_cap_leaves_out_depends_on_the_sample_and_its_key_alone() -> None:
    batch = tiny.batch([(0, 1, 20), (0, 1, 20), (1, 2, 20)])
    drawn = torch.randint(5, tiny.VOCABULARY, (60, 3), generator=torch.Generator().manual_seed(1))
    drawn[20:40] = drawn[:20]
    batch.input_ids[1] = batch.input_ids[0]
    fitted = capped(batch, drawn, [7, 8, 9], 40)
    assert not torch.equal(fitted[:20], fitted[20:40]), "another key, other steps"
    assert torch.equal(fitted[:40], capped(tiny.part(batch, 0, 2), drawn[:40], [7, 8], 40))
    assert torch.equal(fitted[40:], capped(tiny.part(batch, 2, 3), drawn[40:], [9], 40))


def test_every_step_is_as_likely_to_be_left_out_by_a_cap() -> None:
    batch = tiny.batch([(0, 1, 10)])
    drawn = torch.full((10, 1), 39)
    batch.input_ids[batch.input_ids == 39] = 38
    out = sum((capped(batch, drawn, [key], 12 + 4) == LEFT_OUT).float() for key in range(400))[:, 0] / 400
    assert out.tolist() == pytest.approx([0.6] * 10, abs=0.1)  # four standard errors


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_draws_are_those_of_another_step_of_the_answer_whatever_the_batch(seed: int) -> None:
    response = torch.tensor([[False, True, True, True, False, True, True], [False, False, True, True, False, True, False]])
    draws = torch.arange(16).view(8, 2)
    permuted = shuffled(draws, response, [seed, 4])
    for answer in (slice(0, 3), slice(3, 5), slice(5, 7)):  # two answers of the first conversation, one of the second
        assert sorted(permuted[answer].tolist()) == draws[answer].tolist()
        assert not (permuted[answer] == draws[answer]).any()
    assert torch.equal(permuted[7], draws[7])  # an answer of one step
    assert torch.equal(permuted[:5], shuffled(draws[:5], response[:1], [seed]))
