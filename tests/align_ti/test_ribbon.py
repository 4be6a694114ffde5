"""The plan of a ribbon: which rows, how often, which masks; and the draws."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.align_ti.ribbon import continuation_mask, draw, expanded_mask, plan, predicting, uniforms
from tests import tiny

SHAPES = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4).filter(
    lambda samples: any(response for _, _, response in samples)
)


def test_positions_that_predict_the_response() -> None:
    """Off by one is the field's favourite mistake: the last prompt token predicts y_1, and EOS predicts nothing."""
    response = torch.tensor([[False, False, True, True, False], [False, True, True, True, True]])
    assert predicting(response).tolist() == [[False, True, True, False, False], [True, True, True, True, False]]


@given(samples=SHAPES, draws=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_plan_accounts_for_every_draw(samples: list[tuple[int, int, int]], draws: int, seed: int) -> None:
    batch = tiny.batch(samples, seed)
    steps = int(batch.response.sum())
    drawn = torch.randint(0, 8, (steps, draws), generator=torch.Generator().manual_seed(seed))  # few tokens: many repeats
    gold_too = torch.rand(steps, draws, generator=torch.Generator().manual_seed(seed + 1)) < 0.3
    gold = batch.input_ids[:, 1:][batch.response[:, 1:]]
    drawn = torch.where(gold_too, gold[:, None], drawn)
    ribbon = plan(drawn, batch.input_ids, batch.response, tiny.EOS)

    wanted: Counter[tuple[int, int, int]] = Counter()
    places = [(b, t + 1) for b, t in predicting(batch.response).nonzero().tolist()]
    for (b, position), tokens in zip(places, drawn.tolist(), strict=True):
        wanted.update((b, position, token) for token in tokens if token != tiny.EOS)
    found: Counter[tuple[int, int, int]] = Counter()
    for b, e in ribbon.valid.nonzero().tolist():
        key = (b, int(ribbon.positions[b, e]), int(ribbon.tokens[b, e]))
        assert key not in found, "equal draws must share a row"
        assert key[2] != int(batch.input_ids[b, key[1]]), "a gold draw needs no row"
        found[key] = int(ribbon.multiplicity[b, e])
    for b, position in (ribbon.gold > 0).nonzero().tolist():
        found[b, position, int(batch.input_ids[b, position])] = int(ribbon.gold[b, position])
    assert found == wanted
    assert int(ribbon.counted) == wanted.total()


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
            seen = [c for c in range(row + 1) if bool(batch.attention_mask[b, c])] if real else None
            if real:
                assert mask[b, row].nonzero().flatten().tolist() == seen
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
    pairs = draw(p, torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0)), replacement=False)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    share = ((pairs[:, 0] == 0) & (pairs[:, 1] == 1)).float().mean()
    assert share == pytest.approx(0.6 * 0.3 / 0.4, abs=0.015)
    with pytest.raises(ValueError, match="draw with replacement"):
        draw(torch.tensor([[1.0, 0.0]]), torch.rand(1, 2), replacement=False)


def test_extreme_uniforms_draw_possible_tokens() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]])
    u = torch.tensor([[0.0, 1 - 2**-24], [0.0, 1 - 2**-24]])
    assert draw(p, u).tolist() == [[1, 1], [1, 2]]


def test_uniforms_belong_to_the_sample_not_to_the_batch() -> None:
    batch = tiny.batch([(1, 2, 3), (0, 1, 2), (1, 3, 4)])
    together = uniforms(batch.response, [7, 8, 9], 4)
    alone = [uniforms(batch.response[i : i + 1], [key], 4) for i, key in enumerate([7, 8, 9])]
    assert torch.equal(together, torch.cat(alone))
    assert len(torch.unique(together)) == together.numel()
