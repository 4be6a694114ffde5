"""Wrapper of transformers' vision-language models for the method: features, plain, continuation and expanded pass, head.

The plain pass is the stock forward. A forward pre-hook on the language model captures its position ids, of any number of
axes, and its attention masks; in the expanded pass the same hook appends the ribbon's rows (tests/families).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import DynamicCache
from transformers.masking_utils import create_masks_for_generate

from components.align_ti.batch import Batch, Edits
from components.align_ti.head import Head
from components.align_ti.watch import Map, Watch, Watched
from components.errors import ModelError
from components.models.attention import AttentionProbe, decoder_layers, probing
from components.models.families import inputs, reads_one_layer

# Argument name, renamed in transformers 5.24.
CACHE = "cache" if "cache" in signature(create_masks_for_generate).parameters else "past_key_values"
Masks = dict[str, Tensor | None] | Tensor | None  # attention mask (B or 1, 1, T, T) bool; None: causal


@dataclass(frozen=True)
class PrefixCache:
    """State of a plain pass for `continued`: key/value cache of T tokens, their position ids and attention masks."""

    cache: DynamicCache
    positions: Tensor | None  # ([axes,] B or 1, T); None: 0..T-1
    masks: Masks


class _DecoderInputs(Exception):
    """Carrier of the language model's inputs; ends a forward pass before the language model runs."""


class VLM(nn.Module):
    """Wrapper of any model of components/models/families.py."""

    model: Any  # transformers' types do not cover the parts of a vision-language model

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def features(self, batch: Batch) -> Any:
        """Visual features of the batch's images; None without images. A frozen tower runs without autograd.

        LLaVA-1.5: (N, Nv, D), before the projector, so that models with the same tower can share them. Other families: the
        stock output, after the projector, since the modules between differ.
        """
        if batch.pixel_values is None:
            return None
        if not reads_one_layer(self.model):
            return self.model.model.get_image_features(pixel_values=batch.pixel_values, return_dict=True, **batch.image_inputs)
        config = self.model.config
        tower = self.model.model.vision_tower
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())):
            states = tower(batch.pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
            features: Tensor = states[config.vision_feature_layer]
            return features[:, 1:] if config.vision_feature_select_strategy == "default" else features

    def plain(
        self, batch: Batch, features: Any, keep: bool, change: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[Tensor, PrefixCache | None]:
        """Forward pass over the sequence. Returns hidden states (B, T, d) and, if `keep`, the state for `continued`.

        No attention mask is passed: padding is on the right, where no real token attends to it, and the fused causal kernel
        is faster. `change` edits the language model's inputs in place.
        """
        captured: dict[str, Any] = {}

        def capture(decoder_inputs: dict[str, Any]) -> None:
            if change is not None:
                change(decoder_inputs)
            captured.update(decoder_inputs)

        # No config, so no sliding-window layers: those keep the last keys only, and alternatives stand further back.
        cache = DynamicCache() if keep else None
        states = self._stock_forward(batch, features, capture, **{CACHE: cache}, use_cache=keep).last_hidden_state
        return states, None if cache is None else PrefixCache(cache, captured.get("position_ids"), self._masks(captured))

    def continued(self, prefix: PrefixCache, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """(B, E, d) hidden states of `tokens`, each in place of the gold token at its position, over the plain pass's key/value
        cache; attention is the gold token's, further restricted by the (B, 1, E, T + E) `mask`.
        """
        embeddings = self.model.get_input_embeddings()(tokens)
        if not tokens.shape[1]:
            return embeddings  # attention layers fail on zero rows
        return self.model.get_decoder()(
            inputs_embeds=embeddings,
            **{CACHE: prefix.cache},
            attention_mask=_map_masks(
                prefix.masks, lambda gold: _additive_mask(_appended_rows_mask(mask, gold, positions), embeddings.dtype)
            ),
            position_ids=_gather_positions(prefix.positions, positions),
            use_cache=True,
        ).last_hidden_state

    def expanded(self, batch: Batch, features: Any, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """(B, T + E, d) hidden states of one pass with `tokens` appended, under the (B, 1, T + E, T + E) `mask`."""
        B, T = batch.input_ids.shape
        to_mask_format = _block_mask if self.flexes else _additive_mask

        def append_rows(decoder_inputs: dict[str, Any]) -> None:
            embeddings = torch.cat([decoder_inputs["inputs_embeds"], self.model.get_input_embeddings()(tokens)], dim=1)
            masks = self._masks(decoder_inputs)
            gold = decoder_inputs.get("position_ids")
            gold = torch.arange(T, device=tokens.device).expand(B, T) if gold is None else gold
            appended = _gather_positions(gold, positions)
            decoder_inputs["inputs_embeds"] = embeddings
            decoder_inputs["position_ids"] = torch.cat([gold.expand(*appended.shape[:-1], T), appended], dim=-1)
            decoder_inputs["attention_mask"] = _map_masks(
                masks, lambda gold: to_mask_format(_expanded_mask(mask, gold, positions), embeddings.dtype)
            )
            if decoder_inputs.get("visual_pos_masks") is not None:  # features added in deeper layers: none at the appended rows
                decoder_inputs["visual_pos_masks"] = torch.cat(
                    [decoder_inputs["visual_pos_masks"], torch.zeros_like(tokens).bool()], dim=1
                )

        states: Tensor = self._stock_forward(batch, features, append_rows, use_cache=False).last_hidden_state
        return states

    def embedded(self, batch: Batch, features: Any) -> dict[str, Any]:
        """Inputs of the language model: `inputs_embeds` (B, T, d), and features for deeper layers (Qwen3-VL)."""

        def stop(decoder_inputs: dict[str, Any]) -> None:
            raise _DecoderInputs(decoder_inputs)

        try:
            self._stock_forward(batch, features, stop, use_cache=False)
        except _DecoderInputs as stopped:
            return dict(stopped.args[0])
        raise AssertionError("no language model was run")

    def mixed(self, batch: Batch, features: Any, baseline: dict[str, Any], share: Tensor) -> Tensor:
        """(B, T, d) hidden states of a plain pass over interpolated embeddings: `share` (B, T) times the token's own,
        1 - `share` times that of `baseline`, as `embedded` returns it."""

        def mix(decoder_inputs: dict[str, Any]) -> None:
            weights = share.to(decoder_inputs["inputs_embeds"].dtype)
            decoder_inputs["inputs_embeds"] = torch.lerp(
                baseline["inputs_embeds"], decoder_inputs["inputs_embeds"], weights[..., None]
            )
            if (deeper := decoder_inputs.get("deepstack_visual_embeds")) is not None:
                visual = weights[batch.visual][:, None]
                pairs = zip(baseline["deepstack_visual_embeds"], deeper, strict=True)
                decoder_inputs["deepstack_visual_embeds"] = [
                    torch.lerp(baseline_features, own_features, visual) for baseline_features, own_features in pairs
                ]

        return self.plain(batch, features, False, mix)[0]

    def edited(self, edits: Edits) -> Tensor:
        """(n, T, d) hidden states of the edited samples."""
        donor = self.embedded(edits.donor, self.features(edits.donor))
        return self.mixed(edits.batch, self.features(edits.batch), donor, edits.keep)

    @contextmanager
    def watched(self, batch: Batch, watch: Watch) -> Iterator[Watched]:
        """Capture of the attention maps and hidden states of `watch` during one pass over the batch, with gradients.

        Raises ModelError if the model has no such layer, or runs on FlexAttention, which has no maps.
        """
        result = Watched()
        layers = decoder_layers(self.model)
        depth = len(layers)
        if invalid := sorted({*(map.layer for map in watch.maps), *watch.hidden} - set(range(-depth, depth))):
            raise ModelError(f"a loss term reads layers {invalid} of a model whose layers are 0..{depth - 1}")
        if watch.maps and self.flexes:
            raise ModelError("a loss term reads attention maps, which FlexAttention does not have: set flex_attention to false")
        maps_by_rows: dict[tuple[str, bool], list[Map]] = {}
        for map in watch.maps:
            maps_by_rows.setdefault((map.rows, map.each_row), []).append(map)
        with ExitStack() as stack:
            probes: dict[Map, AttentionProbe] = {}
            for (rows, each_row), maps in maps_by_rows.items():
                probe = AttentionProbe.from_masks(getattr(batch, rows), batch.pictures, each_row, gradients=True)
                probes |= dict.fromkeys(maps, probe)
                stack.enter_context(probing(self.model, [map.layer % depth for map in maps], probe))
            for index in watch.hidden:
                hook = layers[index].register_forward_hook(partial(_store_states, result.hidden, index))
                stack.callback(hook.remove)
            yield result
        result.maps |= {map: probe.maps[map.layer % depth] for map, probe in probes.items()}

    def flex(self) -> None:
        """Switch the language model to FlexAttention, whose kernel skips the empty blocks of `expanded`'s mask: alternatives do
        not attend to each other. Its backward pass needs a GPU. For route "expanded" alone: it cannot continue over a
        key/value cache."""
        self.model.set_attn_implementation({"text_config": "flex_attention"})

    @property
    def can_flex(self) -> bool:
        """True for LLaVA-1.5, whose language model builds its own masks; untested with masks that other families pass in."""
        return reads_one_layer(self.model)

    @property
    def flexes(self) -> bool:
        return bool(self.model.config.get_text_config()._attn_implementation == "flex_attention")

    @property
    def head(self) -> Head:
        """Output head with the current weights; `vlm.head(rows)` are logits."""
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, layer.bias, getattr(self.model.config.get_text_config(), "final_logit_softcapping", None))

    def _stock_forward(self, batch: Batch, features: Any, change: Callable[[dict[str, Any]], None], **options: Any) -> Any:
        """Stock forward with a pre-hook: `change` reads or edits the language model's inputs."""
        tokens: dict[str, Any] = {"input_ids": batch.input_ids}
        if isinstance(features, Tensor):  # LLaVA-1.5: scattered here, as the stock check would synchronise with the device
            projected = self.model.model.multi_modal_projector(features).flatten(0, 1)
            words = self.model.get_input_embeddings()(batch.input_ids)
            tokens = {"inputs_embeds": words.masked_scatter(batch.visual[..., None], projected.to(words.dtype))}
        elif features is not None:
            tokens["mm_encoder_outputs"] = {"image": features}

        def hook(_module: nn.Module, args: Any, decoder_inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            change(decoder_inputs)
            return args, decoder_inputs

        handle = self.model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
        try:
            return self.model.model(**tokens, **inputs(self.model, batch), **options)
        finally:
            handle.remove()

    def _masks(self, decoder_inputs: dict[str, Any]) -> Masks:
        """Attention masks of the plain pass, by layer type if there are several."""
        masks = decoder_inputs.get("attention_mask")
        if masks is None:
            config = copy(self.model.config.get_text_config())
            if self.flexes:
                config._attn_implementation = "sdpa"  # SDPA's mask is a tensor, FlexAttention's a function
            masks = create_masks_for_generate(config, decoder_inputs["inputs_embeds"], None, None)
        if isinstance(masks, dict) and len(masks) == 1:
            (masks,) = masks.values()
        return _map_masks(masks, _allowed)


def _allowed(mask: Tensor | None) -> Tensor | None:
    """Bool mask from that of SDPA (bool) or of eager attention (0, or a large negative number)."""
    return mask if mask is None or mask.dtype == torch.bool else mask == 0


def _map_masks(masks: Masks, function: Callable[[Tensor | None], Tensor | BlockMask | None]) -> Any:
    return {kind: function(mask) for kind, mask in masks.items()} if isinstance(masks, dict) else function(masks)


def _gather_positions(positions: Tensor | None, index: Tensor) -> Tensor:
    """Position ids ([axes,] B or 1, T) at (B, E) indices: ([axes,] B, E)."""
    if positions is None:
        return index
    index = index.expand(*positions.shape[:-2], *index.shape)
    return positions.expand(*index.shape[:-1], -1).gather(-1, index)


def _appended_rows_mask(mask: Tensor, gold: Tensor | None, positions: Tensor) -> Tensor:
    """(B, 1, E, T + E) `mask`, its first T columns restricted to the gold mask at (B, E) `positions`."""
    if gold is None:
        return mask
    B, E = positions.shape
    T = gold.shape[-1]
    visible = gold.expand(B, 1, T, T).gather(2, positions[:, None, :, None].expand(B, 1, E, T))
    return torch.cat([mask[..., :T] & visible, mask[..., T:]], dim=-1)


def _expanded_mask(mask: Tensor, gold: Tensor | None, positions: Tensor) -> Tensor:
    """(B, 1, T + E, T + E) mask: gold rows attend as in the plain pass, appended rows as in `_appended_rows_mask`."""
    if gold is None:
        return mask
    T = gold.shape[-1]
    top = torch.cat([gold.expand(len(mask), 1, T, T), mask[:, :, :T, T:]], dim=-1)
    return torch.cat([top, _appended_rows_mask(mask[:, :, T:], gold, positions)], dim=2)


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive form of a bool mask: eager attention would silently add True as 1."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _block_mask(mask: Tensor, _dtype: torch.dtype) -> BlockMask:
    """FlexAttention's block mask of a (B, 1, Q, K) bool mask: empty blocks, full blocks, and the mask for the rest."""
    B, _, Q, K = mask.shape

    def visible(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask[b, 0, q, k]

    return create_block_mask(visible, B, None, Q, K, device=mask.device)


def _store_states(hidden: dict[int, Tensor], layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
    """Forward hook that stores a layer's output hidden states."""
    hidden.setdefault(layer, output[0] if isinstance(output, tuple) else output)
