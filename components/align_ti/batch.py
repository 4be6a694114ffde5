"""Protocol of a micro-batch: with `head.py`, all that models import of the method."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Protocol, cast

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


@dataclass(frozen=True)
class Edits:
    """n of a batch's samples once more, some tokens given the embeddings of another sample's, and what the teacher says.

    Where none of the samples is edited, n is 1, without a response. Distributions are over W tokens, and all others as one.
    """

    batch: Batch
    other: Batch  # the same, with the other samples' pictures, and their words where an instruction stands
    own: Tensor  # (n, T) float: 1 where a token keeps its embedding, 0 where it gets that of `other`
    places: Tensor  # (n,) long: of each sample in the whole batch; none where none is edited
    effect: Tensor  # (n,) bool: what the edit changes is compared; else what it leaves
    tokens: Tensor  # (N, W) long, at the N rows that predict the responses
    whole: Tensor  # (N, W + 1) the teacher's distributions without an edit
    without: Tensor  # (N, W + 1) and with the evidence taken away

    def to(self, device: torch.device | str) -> Edits:
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return replace(self, **moved)


def edits_of(batch: Batch) -> Edits | None:
    return cast("Edits | None", getattr(batch, "edits", None))


def by_column(pictures: Tensor) -> Tensor:
    """(B, Nv) of (B, T): the numbers of the images whose tokens a sample has, in order; 0 beyond them."""
    visual = pictures > 0
    counts = visual.sum(1, keepdim=True)
    columns = pictures.new_zeros(len(pictures), int(counts.max()))
    columns[torch.arange(columns.shape[1], device=pictures.device) < counts] = pictures[visual]
    return columns


def placed(weights: Tensor, pictures: Tensor) -> Tensor:
    """(B, Nv) of (N,) at the visual rows; 0 beyond a sample's own."""
    columns = by_column(pictures)
    return weights.new_zeros(columns.shape).masked_scatter(columns > 0, weights)


def owners(pictures: Tensor) -> list[tuple[int, int]]:
    """Sample and number of each image of (B, T) `pictures`, in order."""
    return [(sample, number) for sample, most in enumerate(pictures.amax(1).tolist()) for number in range(1, most + 1)]


def of_images(states: Tensor, batch: Batch) -> list[Tensor]:
    """(Nv, ...) at the visual tokens of each image, of (B, T, ...) states."""
    return [states[sample][batch.pictures[sample] == number] for sample, number in owners(batch.pictures)]


def predicting(response: Tensor) -> Tensor:
    """(B, T) bool: positions whose next-token prediction is about a response token. Position t predicts token t + 1."""
    return torch.cat([response[:, 1:], torch.zeros_like(response[:, :1])], dim=1)
