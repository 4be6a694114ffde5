"""Micro-batch protocol, edited batches of L_mcd, and indexing of visual tokens by image."""

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
        """(B, T) long: image number within the sample, from 1, at visual tokens; 0 elsewhere."""

    @property
    def pixel_values(self) -> Tensor | None: ...
    @property
    def image_inputs(self) -> dict[str, Tensor]: ...
    def to(self, device: torch.device) -> Batch: ...


@dataclass(frozen=True)
class Edits:
    """Counterfactual edits of n samples of a batch, with cached teacher distributions at their response rows.

    Distributions cover W tokens plus the residual mass. A batch without edited samples has n = 1 and an empty response.
    """

    batch: Batch
    donor: Batch  # the same sequences with another sample's images and instruction words
    keep: Tensor  # (n, T) float: 1 keeps the token's embedding, 0 takes the donor's
    indices: Tensor  # (n,) long: index of each sample in the whole batch; empty if none is edited
    effect: Tensor  # (n,) bool: True if the evidence is replaced, False if everything else is
    tokens: Tensor  # (N, W) long, at the N rows that predict the responses
    whole: Tensor  # (N, W + 1) teacher probabilities on the unedited input
    without: Tensor  # (N, W + 1) teacher probabilities with the evidence replaced

    def to(self, device: torch.device | str) -> Edits:
        tensors = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return replace(self, **tensors)


def edits_of(batch: Batch) -> Edits | None:
    return cast("Edits | None", getattr(batch, "edits", None))


def by_column(pictures: Tensor) -> Tensor:
    """(B, Nv) image number of each visual token, packed to the left from (B, T) `pictures`; 0 is padding."""
    visual = pictures > 0
    counts = visual.sum(1, keepdim=True)
    columns = pictures.new_zeros(len(pictures), int(counts.max()))
    columns[torch.arange(columns.shape[1], device=pictures.device) < counts] = pictures[visual]
    return columns


def scatter_visual(weights: Tensor, pictures: Tensor) -> Tensor:
    """(B, Nv) scatter of (N,) weights of the visual rows; 0 is padding."""
    columns = by_column(pictures)
    return weights.new_zeros(columns.shape).masked_scatter(columns > 0, weights)


def image_indices(pictures: Tensor) -> list[tuple[int, int]]:
    """(sample, image number) of each image of (B, T) `pictures`, in order."""
    return [(sample, number) for sample, count in enumerate(pictures.amax(1).tolist()) for number in range(1, count + 1)]


def split_by_image(states: Tensor, batch: Batch) -> list[Tensor]:
    """Hidden states (Nv, ...) at each image's visual tokens, one tensor per image, from (B, T, ...) states."""
    return [states[sample][batch.pictures[sample] == number] for sample, number in image_indices(batch.pictures)]


def index_within(groups: Tensor) -> Tensor:
    """(N,) index of each row within its group, from 0; `groups` (N,) is sorted."""
    size = groups.bincount()
    return torch.arange(len(groups), device=groups.device) - (size.cumsum(0) - size)[groups]


def answers(rows: Tensor) -> Tensor:
    """(N,) answer of each row of a (B, T) bool mask, numbered from 0 over the batch: a run of adjacent rows of one sample."""
    sample, position = rows.nonzero().unbind(1)
    begins = (sample.diff() != 0) | (position.diff() != 1)
    return torch.cat([position.new_zeros(min(1, len(position))), begins.long()]).cumsum(0)


def predicting(response: Tensor) -> Tensor:
    """(B, T) bool: rows that predict a response token. Position t predicts token t + 1."""
    return torch.cat([response[:, 1:], torch.zeros_like(response[:, :1])], dim=1)
