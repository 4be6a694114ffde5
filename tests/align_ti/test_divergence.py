"""The divergence driver against plain formulas, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.align_ti.divergence import divergence, row_divergence

KINDS = ["forward", "reverse", "jsd", "skewed"]


def logits(seed: int, rows: int = 6, columns: int = 11, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def reference(t: torch.Tensor, s: torch.Tensor, kind: str, mix: float, temperature: float) -> torch.Tensor:
    """By the definitions, in probabilities."""
    p, q = torch.softmax(t / temperature, -1), torch.softmax(s / temperature, -1)

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * torch.log(a / b)).sum(-1)

    m = mix * p + (1 - mix) * q
    return {"forward": kl(p, q), "reverse": kl(q, p), "jsd": mix * kl(p, m) + (1 - mix) * kl(q, m), "skewed": kl(p, m)}[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), mix=st.floats(0.05, 0.95), temperature=st.floats(0.5, 4.0))
@settings(max_examples=25, deadline=None)
def test_equals_the_definition(kind: str, seed: int, mix: float, temperature: float) -> None:
    t, s = logits(seed), logits(seed + 1).requires_grad_()
    got, wanted = divergence(t, s, kind, mix, temperature), reference(t, s, kind, mix, temperature)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), s), torch.autograd.grad(wanted.sum(), s), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_finite_differences(kind: str) -> None:
    t = logits(1)
    assert torch.autograd.gradcheck(lambda s: divergence(t, s, kind, 0.3, 1.5), logits(2).requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_zero_only_for_equal_distributions(kind: str) -> None:
    t = logits(3)
    exact = kind in ("forward", "reverse")  # the others round once, in the mixture
    assert divergence(t, t.clone(), kind).abs().max() <= (0 if exact else 1e-15)
    assert divergence(t, logits(4), kind).min() > 1e-3


def test_heads_of_different_width_are_cut_before_the_softmax() -> None:
    t, s = logits(5, columns=11), logits(6, columns=9)
    torch.testing.assert_close(divergence(t, s), divergence(t[:, :9], s))
    assert not torch.allclose(
        divergence(t[:, :9], s), (t.softmax(-1)[:, :9] * (t.log_softmax(-1)[:, :9] - s.log_softmax(-1))).sum(-1)
    )


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_masked_vocabulary_entries_add_nothing(kind: str) -> None:
    t, s = logits(7), logits(8)
    t[:, 3] = s[:, 3] = -math.inf
    s.requires_grad_()
    keep = [c for c in range(11) if c != 3]
    value = divergence(t, s, kind)
    torch.testing.assert_close(value, divergence(t[:, keep], s[:, keep], kind))
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_chunks_change_neither_value_nor_gradient(chunk: int) -> None:
    stream = torch.Generator().manual_seed(9)
    t_rows, s_rows = (torch.randn(13, d, generator=stream, dtype=torch.float64) for d in (5, 3))
    t_head, s_head = (torch.randn(8, d, generator=stream, dtype=torch.float64) for d in (5, 3))
    s_rows.requires_grad_(), s_head.requires_grad_()

    def run(size: int) -> tuple[torch.Tensor, ...]:
        value = row_divergence(t_rows, lambda x: x @ t_head.T, s_rows, lambda x: x @ s_head.T, chunk_rows=size)
        return value, *torch.autograd.grad((value * torch.arange(13)).sum(), (s_rows, s_head))

    for got, wanted in zip(run(chunk), run(1000), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


def test_chunks_keep_one_chunk_of_logits_for_the_backward_pass() -> None:
    """What autograd saves must not grow with rows x vocabulary."""
    rows, vocabulary, d = 64, 5_000, 4
    head = torch.randn(vocabulary, d, requires_grad=True)
    hidden = torch.randn(rows, d, requires_grad=True)

    def saved_elements(chunk_rows: int) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            row_divergence(hidden.detach(), lambda x: x @ head.T, hidden, lambda x: x @ head.T, chunk_rows=chunk_rows)
        return sum(sizes)

    assert saved_elements(1000) > rows * vocabulary
    assert saved_elements(8) < rows * vocabulary / 100


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        divergence(logits(1), logits(2), "kl")
