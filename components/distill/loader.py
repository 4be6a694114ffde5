"""Loader of each step's batches: collated here or ahead by other processes, with equal results in equal order.

Batches come through a pipe as bytes, not through shared memory as PyTorch passes tensors: containers have little of it
(and processes few open files), and a tensor that finds no room there never arrives.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from components.align_ti.ribbon import draw_key
from components.config.distill import DistillSettings
from components.dataset.shards import Samples
from components.distill.rollouts import Rollouts
from components.distill.sampler import Sampler, shared_out, shared_out_by_length
from components.errors import AlignTIError, TryAgainError
from components.models.collate import Batch, Collator
from components.process import end_with_parent
from components.teacher_answers.store import Answers
from components.teacher_cache.evidence import Evidence

MicroBatches = list[tuple[Batch, list[int]]]


class Steps(Dataset[MicroBatches | AlignTIError]):
    """Step -> the collated micro-batches of one rank, with the seeds of their samples' draws: a function of the step alone, and
    of the student as it is, where it writes `rollouts`.

    What is wrong with a sample comes as the error, so that it keeps its one sentence on the way out of a process.
    """

    def __init__(
        self,
        samples: Samples,
        collator: Collator,
        order: Sampler,
        settings: DistillSettings,
        rank: int,
        ranks: int,
        rollouts: Rollouts | None = None,
        answers: Answers | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        self.samples, self.collator, self.order, self.settings = samples, collator, order, settings
        self.rank, self.ranks, self.rollouts, self.answers, self.evidence = rank, ranks, rollouts, answers, evidence
        self._lengths: dict[int, int] = {}

    def __getitem__(self, step: int) -> MicroBatches | AlignTIError:
        try:
            mine = self._shared_out(self.order.batch(step))
            written = self._written(list(chain(*mine)))
            return [self._collated(micro, written) for micro in mine]
        except AlignTIError as error:
            return error

    def _written(self, pairs: list[tuple[int, int]]) -> dict[int, list[int]]:
        """Key -> tokens of the answer that a model wrote; no such key: the data's."""
        order, answers = self.order, self.answers
        by_teacher = {key: answers.of(sample, order.epoch(key)) for key, sample in pairs} if answers else {}
        return {**by_teacher, **(self.rollouts.written(pairs) if self.rollouts else {})}

    def _collated(self, micro: list[tuple[int, int]], written: dict[int, list[int]]) -> tuple[Batch, list[int]]:
        batch = self.collator([self.samples[index] for _, index in micro], [written.get(key) for key, _ in micro])
        seeds = [draw_key(self.order.seed, key) for key, _ in micro]
        return (self.evidence.edit(batch, [index for _, index in micro], seeds) if self.evidence else batch), seeds

    def _shared_out(self, batch: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        tokens = self.settings.micro_batch_tokens
        if tokens is None:
            return shared_out(batch, self.settings.micro_batch_size, self.rank, self.ranks)
        fresh = [index for _, index in batch if index not in self._lengths]
        if fresh:
            encoded = self.collator.encode([self.samples[index] for index in fresh])
            self._lengths |= {index: len(row.input_ids) for index, row in zip(fresh, encoded, strict=True)}
        lengths = [self._lengths[index] for _, index in batch]
        return shared_out_by_length(batch, lengths, tokens, self.rank, self.ranks)


def batches(steps: Steps, first: int, last: int, loaders: int) -> Iterator[MicroBatches]:
    """Steps `first` .. `last` - 1, two ahead in each of `loaders` processes; 0: in this one, when asked.

    Raises what `Collator` and `shared_out` do, when its step is asked for; TryAgainError if the processes cannot start.
    """
    loader = DataLoader(
        steps,
        batch_size=None,  # a step is a batch already
        sampler=range(first, last),
        num_workers=loaders,
        collate_fn=pickle.dumps if loaders else _as_is,
        generator=torch.Generator(),  # it draws a seed that nobody needs: not from the run's own stream
        multiprocessing_context="spawn" if loaders else None,  # forking beside a GPU or threads may lock up
        worker_init_fn=_worker if loaders else None,
    )
    try:
        stream = iter(loader)
    except OSError as error:
        raise TryAgainError(
            f"{loaders} processes that load batches cannot start: {error}; give this machine more shared memory (a container:"
            " --shm-size) or open files, or set loaders: 0 in params/runtime.yaml"
        ) from error
    for found in stream:
        if loaders:
            found = pickle.loads(found)  # noqa: S301 (of our own process)
        if isinstance(found, AlignTIError):
            raise found
        yield found


@contextmanager
def deaths_explained() -> Iterator[None]:
    """Raises TryAgainError where PyTorch says that a loader has died, which may be in the middle of anything."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise TryAgainError(
            f"a process that loads batches ended ({str(error).strip()}); run the same command to go on, with fewer `loaders` in"
            " params/runtime.yaml if memory is short"
        ) from error


def _as_is(batch: Any) -> Any:
    return batch


def _worker(_number: int) -> None:
    os.setpgrp()  # who asks the training's whole group to end asks the loop, which needs its batches until it has saved
    end_with_parent()
