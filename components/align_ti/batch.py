"""Micro-batch, edited batches of L_mcd, and indexing of visual tokens by image."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Micro-batch of B samples of at most T tokens; images in the order of the samples and of their marks."""

    ids: list[str]
    input_ids: Tensor  # (B, T) long
    attention_mask: Tensor  # (B, T) long, 0 at padding
    response: Tensor  # (B, T) bool: answers, the EOS of each included
    instruction: Tensor  # (B, T) bool: text after the first image without responses, or a part of it
    pictures: Tensor  # (B, T) long: image number within the sample, from 1, at visual tokens; 0 elsewhere
    pixel_values: Tensor | None  # float32: LLaVA's (images, 3, H, W), others' tiles or patches; None if no sample has an image
    image_inputs: dict[str, Tensor] = field(default_factory=dict)  # further image inputs of the family: sizes, grids, masks
    image_ids: list[str] = field(default_factory=list)  # ids of the images in `pixel_values`
    teacher: Batch | None = None  # the same samples by the teacher's processor, if it differs
    edits: Edits | None = None  # edited samples for L_mcd
    dependence: Tensor | None = None  # (B, T) image dependence of response tokens, cached for L_va_kd; 0 elsewhere

    @property
    def visual(self) -> Tensor:
        """(B, T) bool: visual tokens."""
        return self.pictures > 0

    def to(self, device: torch.device | str) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        moved["image_inputs"] = {name: tensor.to(device, non_blocking=True) for name, tensor in self.image_inputs.items()}
        moved |= {name: value.to(device) for name in ("teacher", "edits") if (value := getattr(self, name)) is not None}
        return replace(self, **moved)


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
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return replace(self, **tensors)


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


def permuted_by_image(states: list[Tensor], batch: Batch) -> list[Tensor]:
    """Control: states (Nv, ...) of each image, as `split_by_image` gives them, at its visual tokens in another order."""
    images = zip(states, image_indices(batch.pictures), strict=True)
    return [image_states[permutation(len(image_states), batch.ids[sample])] for image_states, (sample, _) in images]


def permutation(size: int, sample_id: str) -> Tensor:
    """(size,) random order, seeded by a sample's id."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(zlib.crc32(sample_id.encode())))


def random_cycle(groups: Tensor, priority: Tensor) -> Tensor:
    """(N,) index of another row of each row's group, `groups` (N,) sorted: one random cycle, in the order of `priority` (N,).

    No row keeps its own, but the only row of a group of one.
    """
    cycle = priority.argsort(stable=True)
    cycle = cycle[groups[cycle].argsort(stable=True)]  # by group, then at random
    step = index_within(groups)
    first, size = torch.arange(len(groups), device=groups.device) - step, groups.bincount()[groups]
    successor = torch.empty_like(cycle)
    successor[cycle] = cycle[first + (step + 1) % size]
    return successor


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
