"""Protocol of a micro-batch: with `head.py`, all that models import of the method."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """Right-padded sequences of T tokens; the masks are (B, T) bool, and so is `visual`, where `pictures` are positive."""

    @property
    def ids(self) -> list[str]: ...
    @property
    def input_ids(self) -> Tensor: ...
    @property
    def attention_mask(self) -> Tensor: ...
    @property
    def response(self) -> Tensor: ...
    @property
    def instruction(self) -> Tensor: ...
    @property
    def visual(self) -> Tensor: ...
    @property
    def pictures(self) -> Tensor:
        """(B, T) long: at an image's tokens its number in the sample, from 1; 0 elsewhere."""

    @property
    def pixel_values(self) -> Tensor | None: ...
    @property
    def image_inputs(self) -> dict[str, Tensor]: ...
    def to(self, device: torch.device) -> Batch: ...


def by_column(pictures: Tensor) -> Tensor:
    """(B, Nv) of (B, T): the numbers of the images whose tokens a sample has, in order; 0 beyond them."""
    visual = pictures > 0
    counts = visual.sum(1, keepdim=True)
    columns = pictures.new_zeros(len(pictures), int(counts.max()))
    columns[torch.arange(columns.shape[1], device=pictures.device) < counts] = pictures[visual]
    return columns


def owners(pictures: Tensor) -> list[tuple[int, int]]:
    """Sample and number of each image of (B, T) `pictures`, in order."""
    return [(sample, number) for sample, most in enumerate(pictures.amax(1).tolist()) for number in range(1, most + 1)]


def of_images(states: Tensor, batch: Batch) -> list[Tensor]:
    """(Nv, ...) at the visual tokens of each image, of (B, T, ...) states."""
    return [states[sample][batch.pictures[sample] == number] for sample, number in owners(batch.pictures)]


def predicting(response: Tensor) -> Tensor:
    """(B, T) bool: positions whose next-token prediction is about a response token. Position t predicts token t + 1."""
    return torch.cat([response[:, 1:], torch.zeros_like(response[:, :1])], dim=1)
