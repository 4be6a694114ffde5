"""Protocol of a micro-batch: with `head.py`, all that models import of the method."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """Right-padded sequences of T tokens; the masks are (B, T) bool."""

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
    def pixel_values(self) -> Tensor | None: ...
    @property
    def image_inputs(self) -> dict[str, Tensor]: ...
    def to(self, device: torch.device) -> Batch: ...


def of_images(states: Tensor, batch: Batch) -> list[Tensor]:
    """(Nv, ...) at the visual tokens of each sample that has some, of (B, T, ...) states."""
    return [states[sample][batch.visual[sample]] for sample in batch.visual.any(1).nonzero()[:, 0].tolist()]


def predicting(response: Tensor) -> Tensor:
    """(B, T) bool: positions whose next-token prediction is about a response token. Position t predicts token t + 1."""
    return torch.cat([response[:, 1:], torch.zeros_like(response[:, :1])], dim=1)
