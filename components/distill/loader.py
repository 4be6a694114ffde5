"""Batch loader: collation in this process or in worker processes, with equal results in equal order.

Workers send batches through a pipe as bytes, not through shared memory, PyTorch's default for tensors: containers have little
of it (and processes few open files), and a tensor without room there never arrives.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch.utils.data import DataLoader, Dataset

from components.align_ti.batch import Batch
from components.align_ti.ribbon import draw_key
from components.config.distill import DistillSettings
from components.dataset.shards import Samples
from components.distill.rollouts import Rollouts
from components.distill.sampler import Sampler, split_batch, split_batch_by_length
from components.errors import AlignTIError, TryAgainError
from components.models.collate import Collator
from components.process import end_with_parent
from components.teacher_answers.store import Answers
from components.teacher_cache.evidence import Evidence, ImageDependence

MicroBatches = list[tuple[Batch, list[int]]]


@dataclass
class Steps(Dataset[MicroBatches | AlignTIError]):
    """Dataset of steps: the collated micro-batches of one rank, with the seeds of their samples' draws. A pure function of the
    step, except for `rollouts`, which depend on the current student.

    Errors of a sample are returned, not raised, so that their message survives the way out of a worker process.
    """

    samples: Samples
    collator: Collator
    order: Sampler
    settings: DistillSettings
    rank: int
    ranks: int
    rollouts: Rollouts | None = None
    answers: Answers | None = None
    evidence: Sequence[Evidence | ImageDependence] = ()

    def __getitem__(self, step: int) -> MicroBatches | AlignTIError:
        try:
            micro_batches = self._micro_batches(self.order.batch(step))
            generated = self._generated_answers(list(chain(*micro_batches)))
            return [self._collated(micro, generated) for micro in micro_batches]
        except AlignTIError as error:
            return error

    def _generated_answers(self, pairs: list[tuple[int, int]]) -> dict[int, list[list[int]]]:
        """Tokens of generated answers by key; samples without an entry keep the data's answers."""
        order, answers = self.order, self.answers
        by_teacher = {key: answers.conversation(sample, order.epoch(key)) for key, sample in pairs} if answers else {}
        return {**by_teacher, **(self.rollouts.generate(pairs) if self.rollouts else {})}

    def _collated(self, micro: list[tuple[int, int]], generated: dict[int, list[list[int]]]) -> tuple[Batch, list[int]]:
        batch = self.collator([self.samples[index] for _, index in micro], [generated.get(key) for key, _ in micro])
        seeds = [draw_key(self.order.seed, key) for key, _ in micro]
        for kept in self.evidence:
            batch = kept.edit(batch, [index for _, index in micro], seeds)
        return batch, seeds

    def _micro_batches(self, batch: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        tokens = self.settings.micro_batch_tokens
        if tokens is None:
            return split_batch(batch, self.settings.micro_batch_size, self.rank, self.ranks)
        lengths = [self.samples.tokens(index) for _, index in batch]
        return split_batch_by_length(batch, lengths, tokens, self.rank, self.ranks)


def batches(steps: Steps, first: int, last: int, loaders: int) -> Iterator[MicroBatches]:
    """Micro-batches of steps `first` .. `last` - 1, prefetched two ahead by each of `loaders` workers; 0: in this process.

    Raises errors of `Collator` and `split_batch` at their step; TryAgainError if the workers cannot start.
    """
    loader = DataLoader(
        steps,
        batch_size=None,  # a step is a batch already
        sampler=range(first, last),
        num_workers=loaders,
        collate_fn=pickle.dumps if loaders else lambda micro_batches: micro_batches,
        generator=torch.Generator(),  # keeps DataLoader's unused base seed off the run's random stream
        multiprocessing_context="spawn" if loaders else None,  # fork may deadlock beside CUDA or threads
        worker_init_fn=_worker if loaders else None,
    )
    try:
        stream = iter(loader)
    except OSError as error:
        raise TryAgainError(
            f"{loaders} processes that load batches cannot start: {error}; give this machine more shared memory (a container:"
            " --shm-size) or open files, or set loaders: 0 in params/runtime.yaml"
        ) from error
    for item in stream:
        if loaders:
            item = pickle.loads(item)  # noqa: S301 (of our own process)
        if isinstance(item, AlignTIError):
            raise item
        yield item


@contextmanager
def worker_errors() -> Iterator[None]:
    """Translate PyTorch's error about a dead worker, which can arise at any point, to TryAgainError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise TryAgainError(
            f"a process that loads batches ended ({str(error).strip()}); run the same command to go on, with fewer `loaders` in"
            " params/runtime.yaml if memory is short"
        ) from error


def _worker(_number: int) -> None:
    os.setpgrp()  # signals to the training's process group must not reach workers: the loop needs batches until it has saved
    end_with_parent()
