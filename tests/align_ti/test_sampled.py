"""Draws of the teacher against its whole distribution: the mean over all uniforms is the exact divergence, gradient too."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.align_ti.cached import cached_row_divergence
from components.align_ti.divergence import divergence
from components.align_ti.head import Head
from components.align_ti.sampled import sampled
from tests.align_ti.test_divergence import logits


@given(seed=st.integers(0, 10_000), draws=st.integers(1, 9), temperature=st.floats(0.5, 4.0), scale=st.floats(0.1, 9.0))
@settings(max_examples=8)
def test_the_mean_over_uniforms_is_exact_and_counts_are_within_one(
    seed: int, draws: int, temperature: float, scale: float
) -> None:
    t, s = logits(seed, scale=scale), logits(seed + 1).requires_grad_()
    exact = divergence(t, s, temperature=temperature)
    uniforms, p = (torch.arange(2000) + 0.5) / 2000, (t / temperature).softmax(-1)
    value, gradient = torch.zeros_like(exact), torch.zeros_like(s)
    for uniform in uniforms.split(200):
        many = [x.repeat_interleave(len(uniform), 0) for x in (t, s)]
        drawn = sampled(many[0], draws, uniform.repeat(len(t)), temperature)
        assert (drawn.counts.sum(1) == draws).all() and drawn.tokens.shape[1] <= draws
        expected = draws * p.repeat_interleave(len(uniform), 0).gather(1, drawn.tokens)
        assert ((drawn.counts - expected).abs() < 1 + 1e-9)[drawn.counts > 0].all()
        estimate = drawn.divergence(many[1], temperature).unflatten(0, (len(t), -1)).sum(1) / len(uniforms)
        value, gradient = value + estimate.detach(), gradient + torch.autograd.grad(estimate.sum(), s)[0]
    torch.testing.assert_close(value, exact.detach(), rtol=1e-2, atol=2e-3 * scale)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact.sum(), s)[0], rtol=0, atol=2e-3)


def test_a_token_that_has_all_the_mass_is_exact_and_rows_go_through_the_head_in_chunks() -> None:
    sure, s = 200.0 * torch.eye(6, 11, dtype=torch.float64), logits(4)
    drawn = sampled(sure, 50, torch.rand(6))
    assert drawn.tokens.shape == (6, 1)
    torch.testing.assert_close(drawn.divergence(s[:6]), divergence(sure, s[:6]))
    drawn, rows, head = sampled(logits(5), 7, torch.rand(len(s))), torch.randn(len(s), 3).double(), torch.randn(13, 3).double()
    expected = drawn.divergence((rows @ head.T)[:, :11])
    torch.testing.assert_close(
        cached_row_divergence(drawn, rows, Head(head), shared=11, chunk_mib=2 * 4 * 13 / 2**20), expected
    )
    assert len(sampled(s[:0], 7, torch.rand(0))) == 0
