"""Loading ahead in other processes gives the batches of loading here, whoever starts where."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from components.artifacts import DATASET, MODELS
from components.distill.loader import MicroBatches, Steps, batches
from components.distill.order import Order
from components.errors import DataError
from components.models.collate import Collator
from components.models.load import load_processor
from components.models.template import Template
from components.settings import load_settings
from components.shards import Samples


def steps_of(max_length: int = 64, rank: int = 0, ranks: int = 1, **changes: Any) -> Steps:
    settings = load_settings().distill.model_copy(update=changes)
    collator = Collator(load_processor(MODELS / "students/student"), Template(""), max_length, train=True)
    samples = Samples(DATASET, "train")
    return Steps(samples, collator, Order(list(range(len(samples))), settings.batch_size, 1), settings, rank, ranks)


def same(one: MicroBatches, other: MicroBatches) -> bool:
    return [(batch.ids, keys) for batch, keys in one] == [(batch.ids, keys) for batch, keys in other] and all(
        torch.equal(a.input_ids, b.input_ids)
        and (a.pixel_values is b.pixel_values or torch.equal(a.pixel_values, b.pixel_values))
        for (a, _), (b, _) in zip(one, other, strict=True)
    )


def test_two_loaders_give_what_none_does_from_any_step_on(workplace: Path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    here = list(batches(steps_of(micro_batch_tokens=64), 0, 4, loaders=0))
    assert torch.equal(torch.random.get_rng_state(), before)  # the run's own stream is not drawn from
    assert len(here) == 4 and not same(here[0], here[1])
    ahead = list(batches(steps_of(micro_batch_tokens=64), 2, 4, loaders=2))
    assert all(same(one, other) for one, other in zip(here[2:], ahead, strict=True))


def test_ranks_load_their_shares_of_the_same_batch(workplace: Path) -> None:
    whole = next(batches(steps_of(), 0, 1, loaders=0))
    shares = [next(batches(steps_of(rank=rank, ranks=2), 0, 1, loaders=0)) for rank in range(2)]
    assert [id_ for batch, _ in whole for id_ in batch.ids] == [
        id_ for share in shares for batch, _ in share for id_ in batch.ids
    ]
    assert [key for _, keys in whole for key in keys] == [key for share in shares for _, keys in share for key in keys]


def test_a_sample_that_cannot_be_used_is_named_when_its_step_comes(workplace: Path) -> None:
    steps = steps_of(max_length=3)
    assert isinstance(pickle.loads(pickle.dumps(steps[0])), DataError)  # noqa: S301 (as it comes from another process)
    with pytest.raises(DataError, match=r"^sample .* tokens, .*max_length is 3$"):
        next(batches(steps, 0, 1, loaders=0))
