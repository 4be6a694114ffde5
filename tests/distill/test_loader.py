"""Loading ahead in other processes gives the batches of loading here, whoever starts where."""

from __future__ import annotations

import os
import pickle
import signal
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config.load import load_settings
from components.dataset.shards import Samples
from components.distill.loader import MicroBatches, Steps, batches, worker_errors
from components.distill.sampler import Sampler
from components.errors import DataError, TryAgainError
from components.models.collate import Collator
from components.models.load import load_processor
from components.models.template import Template
from components.records.paths import DATASET, MODELS, ROWS


def steps_of(max_length: int = 64, rank: int = 0, ranks: int = 1, **changes: Any) -> Steps:
    settings = load_settings().distill.model_copy(update=changes)
    collator = Collator(load_processor(MODELS / "students/student"), Template(""), max_length, train=True)
    samples = Samples(DATASET, "train", ROWS)
    return Steps(samples, collator, Sampler(list(range(len(samples))), settings.batch_size, 1), settings, rank, ranks)


def same(first: MicroBatches, second: MicroBatches) -> bool:
    return [(batch.ids, keys) for batch, keys in first] == [(batch.ids, keys) for batch, keys in second] and all(
        torch.equal(a.input_ids, b.input_ids)
        and (a.pixel_values is b.pixel_values or torch.equal(a.pixel_values, b.pixel_values))
        for (a, _), (b, _) in zip(first, second, strict=True)
    )


def test_two_loaders_give_what_none_does_from_any_step_on(workplace: Path) -> None:
    torch.manual_seed(0)
    rng_state = torch.random.get_rng_state()
    inline = list(batches(steps_of(micro_batch_tokens=64), 0, 4, loaders=0))
    assert torch.equal(torch.random.get_rng_state(), rng_state)  # the run's own stream is not drawn from
    assert len(inline) == 4 and not same(inline[0], inline[1])
    ahead = list(batches(steps_of(micro_batch_tokens=64), 2, 4, loaders=2))
    assert all(same(first, second) for first, second in zip(inline[2:], ahead, strict=True))


def test_passes_by_length_encode_a_rank_s_own_samples_once(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = Collator.encode
    monkeypatch.setattr(
        Collator,
        "encode",
        lambda self, samples, *a, **k: encoded.extend(s.id for s in samples) or encode(self, samples, *a, **k),
    )
    shares = [next(batches(steps_of(micro_batch_tokens=64, rank=rank, ranks=2), 0, 1, loaders=0)) for rank in range(2)]
    assert encoded == [id_ for share in shares for batch, _ in share for id_ in batch.ids]


def test_ranks_load_their_shares_of_the_same_batch(workplace: Path) -> None:
    full = next(batches(steps_of(), 0, 1, loaders=0))
    shares = [next(batches(steps_of(rank=rank, ranks=2), 0, 1, loaders=0)) for rank in range(2)]
    assert [id_ for batch, _ in full for id_ in batch.ids] == [
        id_ for share in shares for batch, _ in share for id_ in batch.ids
    ]
    assert [key for _, keys in full for key in keys] == [key for share in shares for _, keys in share for key in keys]


def test_a_sample_that_cannot_be_used_is_named_when_its_step_comes(workplace: Path) -> None:
    steps = steps_of(max_length=3)
    assert isinstance(pickle.loads(pickle.dumps(steps[0])), DataError)  # noqa: S301 (as it comes from another process)
    with pytest.raises(DataError, match=r"^sample .* tokens, .*max_length is 3$"):
        next(batches(steps, 0, 1, loaders=0))


class _Fails(Steps):
    """Fails in a loader as a fault of ours would."""

    def __getitem__(self, step: int) -> MicroBatches:
        raise ZeroDivisionError(f"step {step}")


def failing() -> _Fails:
    steps = steps_of()
    return _Fails(steps.samples, steps.collator, steps.order, steps.settings, 0, 1)


def test_a_fault_in_a_loader_ends_the_training_as_it_would_here(workplace: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="step 0"):
        next(batches(failing(), 0, 2, loaders=1))


def test_batches_come_without_shared_memory(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers have little of it, and a tensor that finds no room there never arrives."""
    payloads: list[Any] = []
    unpickle = pickle.loads
    monkeypatch.setattr("components.distill.loader.pickle.loads", lambda packed: payloads.append(packed) or unpickle(packed))
    ahead = list(batches(steps_of(), 0, 2, loaders=1))
    assert len(payloads) == 2 and all(isinstance(packed, bytes) for packed in payloads)
    assert not any(batch.input_ids.is_shared() for micro in ahead for batch, _ in micro)


def test_a_loader_that_is_killed_is_a_sentence(workplace: Path) -> None:
    existing = active_children()
    stream = batches(steps_of(), 0, 1000, loaders=1)
    next(stream)
    (loader,) = set(active_children()) - set(existing)
    assert loader.pid is not None
    with pytest.raises(TryAgainError, match=r"a process that loads batches .*loaders"), worker_errors():
        os.kill(loader.pid, signal.SIGKILL)
        for _ in stream:
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # PyTorch's, of a loader that is half made
def test_loaders_that_cannot_start_are_a_sentence(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)
    with pytest.raises(TryAgainError, match=r"No space left on device.*shared memory.*loaders"):
        next(batches(steps_of(), 0, 2, loaders=1))
