"""Which samples make up which step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.distill.order import Order
from components.errors import DataError


@given(samples=st.integers(1, 30), size=st.integers(1, 8), seed=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_every_epoch_holds_every_sample_once(samples: int, size: int, seed: int) -> None:
    order = Order(list(range(100, 100 + samples)), size, seed)
    steps = -(-3 * samples // size)  # three epochs
    drawn = [pair for step in range(steps) for pair in order.batch(step)]
    assert [key for key, _ in drawn] == list(range(steps * size))
    for epoch in range(3):
        assert sorted(index for _, index in drawn[epoch * samples : (epoch + 1) * samples]) == order.samples


def test_another_seed_and_another_epoch_are_other_orders() -> None:
    one, other = Order(list(range(50)), 50, 1), Order(list(range(50)), 50, 2)
    assert [i for _, i in one.batch(0)] != [i for _, i in other.batch(0)]
    assert [i for _, i in one.batch(0)] != [i for _, i in one.batch(1)]


@given(ranks=st.sampled_from([1, 2, 4]), size=st.sampled_from([1, 2]), first=st.integers(0, 3))
def test_ranks_and_micro_batches_share_out_the_same_global_batch(ranks: int, size: int, first: int) -> None:
    order = Order(list(range(37)), 8, seed=3)
    shares = [list(order.micro_batches(first, 4, size, rank, ranks)) for rank in range(ranks)]
    per_step = 8 // (size * ranks)
    for step in range(first, 4):
        here = slice((step - first) * per_step, (step - first + 1) * per_step)
        assert [pair for share in shares for micro in share[here] for pair in micro] == order.batch(step)


def test_nothing_to_distil_on_is_an_error() -> None:
    with pytest.raises(DataError, match="no instruction to distil on"):
        Order([], 4, 1)
