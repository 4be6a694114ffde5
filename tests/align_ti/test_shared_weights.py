"""Two passes that share one weight gradient have the gradient that autograd gives them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from components.align_ti.shared_weights import SharedWeights


class Layers(nn.Module):
    """Tokens -> a state, twice through the same weights, the second time over the first's outputs, as a ribbon is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(7, 4, padding_idx=2)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 4, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.embedding(tokens)).tanh())


TOKENS, MORE = torch.tensor([[1, 2, 3, 3], [0, 6, 2, 1]]), torch.tensor([[2, 3], [5, 5]])


def passes(layers: Layers, shared: SharedWeights | None, narrow: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        if shared is None:
            plain = layers(TOKENS)
            return plain, layers(MORE) * plain.sum()
        with shared.first:
            plain = layers(TOKENS)
        with shared.second:
            more = layers(MORE)
        return plain, more * plain.sum()


def gradients(layers: Layers, *losses: torch.Tensor) -> list[torch.Tensor]:
    layers.zero_grad()
    for loss in losses:
        loss.backward(retain_graph=True)
    return [p.grad for p in layers.parameters() if p.grad is not None]


@pytest.mark.parametrize("frozen", [None, "embedding", "first", "second"])
def test_gradients_are_autograds(frozen: str | None) -> None:
    layers = Layers().double()
    if frozen:
        getattr(layers, frozen).requires_grad_(False)
    expected = gradients(layers, sum(x.square().sum() for x in passes(layers, None)))
    got = gradients(layers, sum(x.square().sum() for x in passes(layers, SharedWeights())))
    assert len(got) == len(expected) == 4 - {None: 0, "embedding": 1, "first": 2, "second": 1}[frozen]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_each_weight_gets_one_gradient_and_the_second_pass_gives_none() -> None:
    layers, given = Layers().double(), []
    for x in (layers.first.weight, layers.second.weight, layers.embedding.weight):
        x.register_hook(given.append)
    plain, more = passes(layers, SharedWeights())
    (more.sum() + 0.0 * plain.sum()).backward()
    assert len(given) == 3
    torch.testing.assert_close(given, [x.grad for x in (layers.second.weight, layers.first.weight, layers.embedding.weight)])


def test_a_second_pass_that_comes_later_answers_for_itself() -> None:
    layers = Layers().double()
    plain, _ = passes(layers, None)
    expected = gradients(layers, plain.sum(), layers(MORE).sum())
    shared = SharedWeights()
    with shared.first:
        plain = layers(TOKENS)
    with shared.second:
        more = layers(MORE)
    torch.testing.assert_close(gradients(layers, plain.sum(), more.sum()), expected, rtol=1e-12, atol=1e-14)


def test_under_autocast_both_passes_compute_with_the_narrow_weight() -> None:
    layers = Layers()
    expected, got = (passes(layers, shared, narrow=True) for shared in (None, SharedWeights()))
    for output, target in zip(got, expected, strict=True):
        assert output.dtype == target.dtype == torch.bfloat16
        torch.testing.assert_close(output, target)
    got_gradients, expected_gradients = (
        gradients(layers, sum(x.float().square().sum() for x in pair)) for pair in (got, expected)
    )
    torch.testing.assert_close(got_gradients, expected_gradients, rtol=3e-2, atol=3e-2)


def test_without_gradients_and_for_frozen_layers_nothing_changes() -> None:
    layers = Layers()
    plain = layers(TOKENS)
    with torch.no_grad(), SharedWeights().first:
        torch.testing.assert_close(layers(TOKENS), plain)
    layers.requires_grad_(False)
    with SharedWeights().first:
        out = layers(TOKENS)
    torch.testing.assert_close(out, plain.detach())
    assert not out.requires_grad
