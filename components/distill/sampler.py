"""Sampler: samples of each step and micro-batch, pure functions of the seed, so that resume needs no sampler state."""

from __future__ import annotations

import torch

from components.errors import DataError, InputError


class Sampler:
    """Shuffled epochs of samples, cut into global batches.

    Args:
        samples: indices of the training samples.
        batch_size: samples per optimiser step, over all ranks and accumulation steps.
        weights: average occurrences of each sample per epoch; None: 1. With weight 2.25 an epoch holds all samples twice and a
            quarter of them once more; the quarter rotates over epochs, so that all occur equally often.
    """

    def __init__(self, samples: list[int], batch_size: int, seed: int, weights: list[float] | None = None) -> None:
        if not samples:
            raise DataError("the train split has no instruction to distil on; see artifacts/dataset/card.md")
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        by_weight: dict[float, list[int]] = {}
        for sample, weight in zip(samples, weights or [1.0] * len(samples), strict=True):
            by_weight.setdefault(weight, []).append(sample)
        self._by_weight = [(weight, by_weight[weight]) for weight in sorted(by_weight)]
        self.epoch_size = len(self._pool(0))
        self._epoch: tuple[int, list[int]] = (-1, [])

    def _pool(self, epoch: int) -> list[int]:
        """Samples of an epoch before shuffling."""
        pool: list[int] = []
        for weight, members in self._by_weight:
            copies, rest = divmod(weight, 1)
            extra = max(round(rest * len(members)), int(not copies))  # few samples of a low weight are not left out for ever
            pool += members * int(copies)
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(members), generator=generator).tolist()
            pool += [members[order[offset % len(order)]] for offset in range(epoch * extra, (epoch + 1) * extra)]
        return pool

    def _shuffled(self, epoch: int) -> list[int]:
        if self._epoch[0] != epoch:
            pool = self._pool(epoch)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            shuffled = torch.randperm(len(pool), generator=generator).tolist()
            self._epoch = (epoch, [pool[i] for i in shuffled])
        return self._epoch[1]

    def batch(self, step: int) -> list[tuple[int, int]]:
        """(key, sample index) pairs of one global batch; keys are unique over the run."""
        keys = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [(key, self._shuffled(self.epoch(key))[key % self.epoch_size]) for key in keys]

    def epoch(self, key: int) -> int:
        return key // self.epoch_size


def split_batch(batch: list[tuple[int, int]], size: int, rank: int, ranks: int) -> list[list[tuple[int, int]]]:
    """Micro-batches of one rank with at most `size` samples, in batch order.

    Raises InputError if the batch does not divide into equally many per rank.
    """
    share, remainder = divmod(len(batch), ranks)
    size = min(size, share)
    if remainder or share % size:
        raise InputError(
            f"params/distill.yaml: batch_size {len(batch)} does not divide into micro-batches of {size or 1}"
            f" on {ranks} process(es)"
        )
    rank_samples = batch[rank * share : (rank + 1) * share]
    return [rank_samples[start : start + size] for start in range(0, share, size)]


def split_batch_by_length(
    batch: list[tuple[int, int]], lengths: list[int], tokens: int, rank: int, ranks: int
) -> list[list[tuple[int, int]]]:
    """Micro-batches of one rank, bucketed by length, with at most `tokens` tokens each, padding included.

    All ranks have equally many, and the n-th has similar cost on each, so that ranks wait little for each other.

    Args:
        lengths: tokens of each sample of the batch, at most `tokens`.

    Raises InputError if the batch does not divide over the ranks: one-sample micro-batches could then not be balanced.
    """
    if len(batch) % ranks:
        raise InputError(f"params/distill.yaml: batch_size {len(batch)} does not divide over {ranks} processes")
    groups: list[list[int]] = []
    for i in sorted(range(len(batch)), key=lambda i: -lengths[i]):
        if not groups or lengths[groups[-1][0]] * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(i)
    while len(groups) % ranks:
        largest = max(groups, key=len)
        half = len(largest) // 2
        groups[groups.index(largest)] = largest[:half]
        groups.append(largest[half:])
    groups.sort(key=lambda group: -lengths[group[0]] * len(group))
    return [[batch[i] for i in group] for group in groups[rank::ranks]]
