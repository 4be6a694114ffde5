"""Frozen teacher of a distillation step, with an attention probe at one layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from components.align_ti.batch import Batch, image_indices, scatter_visual
from components.align_ti.head import Head
from components.align_ti.watch import Watch, Watched
from components.irs.centred import centred_in_batch, count_unweighted_images
from components.models.attention import AttentionProbe, probing
from components.models.attribution import attributions
from components.models.families import reads_one_layer
from components.models.vlm import VLM, PrefixCache


class FrozenTeacher:
    """Frozen `VLM`. Not an nn.Module, so that it never appears among the student's submodules.

    It may be on another device than the batch, except for its head; outputs are on the batch's device.

    Args:
        layer: layer whose attention weights visual tokens.
        shares_tower: True if the student has the same frozen vision tower, so that its image features are reused.
        background: (Nv,) attention background to subtract (`centred`); None: no centring.
        gradient: weight visual tokens by gradient attribution to the answer's log-probability instead.
    """

    def __init__(
        self, vlm: VLM, layer: int, shares_tower: bool, background: Tensor | None = None, gradient: bool = False
    ) -> None:
        self.vlm = vlm.eval().requires_grad_(False)
        self.device = vlm.model.get_input_embeddings().weight.device
        self.layer = layer
        self.shares_tower = shares_tower
        self.background, self.gradient = background, gradient
        self.equal_weights = torch.zeros((), dtype=torch.long)  # count of images with uniform weights for lack of attention

    def features(self, batch: Batch, student_features: Any) -> Any:
        if self.shares_tower and student_features is not None:
            return student_features.detach().to(self.vlm.model.dtype)
        return self.vlm.features(self._to_device(batch))

    def plain(
        self, batch: Batch, features: Any, keep: bool, with_attention: bool
    ) -> tuple[Tensor, PrefixCache | None, Tensor | None]:
        """Hidden states (B, T, d); with `keep` the key/value cache; `with_attention`: the weights of visual tokens (B, Nv)."""
        device = batch.input_ids.device
        batch = self._to_device(batch)
        if isinstance(features, Tensor):
            features = features.to(self.device)
        if not with_attention or self.gradient:
            hidden, cache = self.vlm.plain(batch, features, keep)
            return hidden.to(device), cache, self._gradient_weights(batch, features).to(device) if with_attention else None
        probe = AttentionProbe.from_masks(batch.instruction, batch.pictures)
        with probing(self.vlm.model, [self.layer], probe):
            hidden, cache = self.vlm.plain(batch, features, keep)
        weights = probe.maps[self.layer]
        if self.background is not None:
            weights = centred_in_batch(weights, self.background, batch.pictures, batch.ids)
            self.equal_weights = self.equal_weights.to(weights.device) + count_unweighted_images(weights, batch.pictures)
        return hidden.to(device), cache, weights.to(device)

    def _gradient_weights(self, batch: Batch, features: Any) -> Tensor:
        """(B, Nv) attribution max(0, (e_j - b) ds/de_j), s the answer's mean log-probability, b the image's mean embedding."""
        embedded = self.vlm.embedded(batch, features)
        means = embedded["inputs_embeds"].clone()
        for sample, number in image_indices(batch.pictures):
            in_image = batch.pictures[sample] == number
            means[sample, in_image] = means[sample, in_image].mean(0)
        ones = torch.ones(batch.input_ids.shape, device=means.device)
        slopes = attributions(self.vlm, batch, features, embedded | {"inputs_embeds": means}, ones)
        return scatter_visual(slopes[batch.visual].clamp_min(0), batch.pictures)

    @contextmanager
    def watched(self, batch: Batch, watch: Watch) -> Iterator[Watched]:
        """`VLM.watched`, with captured tensors on the batch's device."""
        with self.vlm.watched(self._to_device(batch), watch) as captured:
            yield captured
        device = batch.input_ids.device
        captured.maps = {map: tensor.to(device) for map, tensor in captured.maps.items()}
        captured.hidden = {layer: states.to(device) for layer, states in captured.hidden.items()}

    def continued(self, cache: PrefixCache, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        inputs = (tensor.to(self.device) for tensor in (tokens, positions, mask))
        return self.vlm.continued(cache, *inputs).to(tokens.device)

    def _to_device(self, batch: Batch) -> Batch:
        return batch if batch.input_ids.device == self.device else batch.to(self.device)

    @property
    def head(self) -> Head:
        return self.vlm.head


def same_tower(first: VLM, second: VLM) -> bool:
    """True if two models have vision towers of equal weights, read at the same layer."""
    if not (reads_one_layer(first.model) and reads_one_layer(second.model)):
        return False  # image features depend on more than the tower
    if any(
        getattr(first.model.config, key) != getattr(second.model.config, key)
        for key in ("vision_feature_layer", "vision_feature_select_strategy")
    ):
        return False
    first_state, second_state = (vlm.model.model.vision_tower.state_dict() for vlm in (first, second))
    return first_state.keys() == second_state.keys() and all(
        torch.equal(first_state[key], second_state[key].to(first_state[key].device)) for key in first_state
    )
