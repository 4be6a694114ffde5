"""Which samples make up which step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.align_ti.ribbon import draw_key, uniforms
from components.distill.sampler import Sampler, split_batch, split_batch_by_length
from components.errors import DataError, InputError


@given(samples=st.integers(1, 30), size=st.integers(1, 8), seed=st.integers(0, 5))
@settings(max_examples=50)
def test_every_epoch_holds_every_sample_once(samples: int, size: int, seed: int) -> None:
    order = Sampler(list(range(100, 100 + samples)), size, seed)
    steps = -(-3 * samples // size)  # three epochs
    drawn = [pair for step in range(steps) for pair in order.batch(step)]
    assert [key for key, _ in drawn] == list(range(steps * size))
    for epoch in range(3):
        assert sorted(index for _, index in drawn[epoch * samples : (epoch + 1) * samples]) == order.samples


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.75, 2.0, 3.4]), min_size=3, max_size=3),
    seed=st.integers(0, 3),
    size=st.integers(1, 7),
)
@settings(max_examples=80)
def test_weighted_samples_come_as_often_as_they_weigh(sizes: list[int], weights: list[float], seed: int, size: int) -> None:
    """In every epoch as often as the weight, rounded one way or the other; over epochs all that weigh alike equally often."""
    of_sample = [weight for number, weight in zip(sizes, weights, strict=False) for _ in range(number)]
    shares = {w: max(1, of_sample.count(w) * int(w) + round(w % 1 * of_sample.count(w))) for w in set(of_sample)}
    order = Sampler(list(range(len(of_sample))), size, seed, of_sample)
    assert order.epoch_size == sum(shares.values())
    epochs = 5
    drawn = [index for step in range(-(-epochs * order.epoch_size // size)) for _, index in order.batch(step)]
    for epoch in range(epochs):
        held = drawn[epoch * order.epoch_size : (epoch + 1) * order.epoch_size]
        for index, weight in enumerate(of_sample):
            assert int(weight) <= held.count(index) <= int(weight) + 1
        assert {w: sum(of_sample[index] == w for index in held) for w in shares} == shares
    complete = drawn[: epochs * order.epoch_size]
    for weight, share in shares.items():
        counts = [complete.count(index) for index, sample_weight in enumerate(of_sample) if sample_weight == weight]
        assert max(counts) - min(counts) <= 1 and sum(counts) == epochs * share
    again = Sampler(list(range(len(of_sample))), size, seed, of_sample)  # resumed: no state but the step
    assert again.batch(3) == order.batch(3)


def test_weights_of_one_change_nothing() -> None:
    plain, weighted = Sampler(list(range(50)), 20, 1), Sampler(list(range(50)), 20, 1, [1.0] * 50)
    assert [plain.batch(step) for step in range(9)] == [weighted.batch(step) for step in range(9)]


def test_another_seed_and_another_epoch_are_other_orders() -> None:
    first, second = Sampler(list(range(50)), 50, 1), Sampler(list(range(50)), 50, 2)
    assert [i for _, i in first.batch(0)] != [i for _, i in second.batch(0)]
    assert [i for _, i in first.batch(0)] != [i for _, i in first.batch(1)]


@given(ranks=st.sampled_from([1, 2, 4]), size=st.sampled_from([1, 2, 8, 100]), step=st.integers(0, 3))
def test_ranks_and_micro_batches_share_out_the_same_global_batch(ranks: int, size: int, step: int) -> None:
    batch = Sampler(list(range(37)), 8, seed=3).batch(step)
    shares = [split_batch(batch, size, rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(shares[0])}
    assert all(1 <= len(micro) <= size for share in shares for micro in share)
    assert [pair for share in shares for micro in share for pair in micro] == batch


@pytest.mark.parametrize(("size", "ranks"), [(3, 1), (3, 2), (2, 3)])
def test_what_does_not_divide_is_refused(size: int, ranks: int) -> None:
    with pytest.raises(InputError, match="batch_size 8 does not divide into micro-batches"):
        split_batch(Sampler(list(range(37)), 8, seed=3).batch(0), size, 0, ranks)


@given(
    ranks=st.sampled_from([1, 2, 3]),
    lengths=st.lists(st.integers(1, 50), min_size=6, max_size=40),
    tokens=st.integers(50, 200),
)
def test_passes_by_length_hold_the_same_batch_within_their_tokens(ranks: int, lengths: list[int], tokens: int) -> None:
    lengths = lengths[: len(lengths) // ranks * ranks]
    batch = [(key, 100 + key) for key in range(len(lengths))]
    shares = [split_batch_by_length(batch, lengths, tokens, rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(shares[0])}, "ranks that pass unequally often wait for ever"
    assert sorted(pair for share in shares for micro in share for pair in micro) == batch
    assert all(micro for share in shares for micro in share)
    assert all(len(micro) * max(lengths[key] for key, _ in micro) <= tokens for share in shares for micro in share)


def test_passes_by_length_hold_little_padding() -> None:
    lengths = [5, 50] * 8
    batch = [(key, key) for key in range(16)]
    assert [[lengths[key] for key, _ in micro] for micro in split_batch_by_length(batch, lengths, 200, 0, 1)] == [
        [50] * 4,
        [50] * 4,
        [5] * 8,
    ]


def test_a_batch_that_does_not_divide_over_ranks_is_refused_by_length_too() -> None:
    with pytest.raises(InputError, match="batch_size 2 does not divide over 3 processes"):
        split_batch_by_length([(0, 0), (1, 1)], [5, 5], 10, 0, 3)


def test_nothing_to_distil_on_is_an_error() -> None:
    with pytest.raises(DataError, match="no instruction to distil on"):
        Sampler([], 4, 1)


def test_every_run_seed_draws_its_own_alternatives() -> None:
    """torch.Generator on a CPU reads 32 bits of a seed: two seeds that differ above them draw the same."""
    response = torch.ones(1, 5, dtype=torch.bool)
    first, second = (uniforms(response, [draw_key(seed, 7)], 4) for seed in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first, uniforms(response, [draw_key(1, 7)], 4))
    assert len({draw_key(1, key) % 2**32 for key in range(1000)}) == 1000
