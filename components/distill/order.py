"""Which samples make up which step: a pure function of the seed, so that resuming needs no state."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from components.errors import DataError


class Order:
    """Epoch after epoch of shuffled samples, cut into global batches and those into micro-batches.

    Args:
        samples: indices of the samples to train on.
        batch_size: of one optimiser step, over all ranks and accumulation steps.
    """

    def __init__(self, samples: list[int], batch_size: int, seed: int) -> None:
        if not samples:
            raise DataError("the train split has no instruction to distil on; see artifacts/dataset/card.md")
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self._epoch: tuple[int, list[int]] = (-1, [])

    def _shuffled(self, epoch: int) -> list[int]:
        if self._epoch[0] != epoch:
            stream = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            shuffled = torch.randperm(len(self.samples), generator=stream).tolist()
            self._epoch = (epoch, [self.samples[i] for i in shuffled])
        return self._epoch[1]

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (key, sample index) pairs of one global batch; the key is unique over the whole run."""
        return [(key, self._at(key)) for key in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def _at(self, key: int) -> int:
        epoch, place = divmod(key, len(self.samples))
        return self._shuffled(epoch)[place]

    def micro_batches(self, first_step: int, steps: int, size: int, rank: int, ranks: int) -> Iterator[list[tuple[int, int]]]:
        """The micro-batches of one rank from `first_step` on; each step gives batch_size / (size * ranks) of them."""
        for step in range(first_step, steps):
            batch = self.batch(step)
            share = batch[rank * len(batch) // ranks : (rank + 1) * len(batch) // ranks]
            for start in range(0, len(share), size):
                yield share[start : start + size]
