"""Vision-language model of transformers behind the method's interface: features, plain, continuation and expanded pass, head.

The plain pass is the stock forward. Its position ids, of any number of axes, and its attention masks are captured by a
forward pre-hook on the language model; in the expanded pass the same hook appends the ribbon's rows (tests/families).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
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

# The argument's name, which transformers 5.24 changed.
CACHE = "cache" if "cache" in signature(create_masks_for_generate).parameters else "past_key_values"
Masks = dict[str, Tensor | None] | Tensor | None  # what each row sees: (B or 1, 1, T, T) bool; None: all before it


@dataclass(frozen=True)
class Kept:
    """A plain pass to continue over: keys and values of T tokens, their position ids, what each of them saw."""

    cache: DynamicCache
    positions: Tensor | None  # ([axes,] B or 1, T); None: 0..T-1
    masks: Masks


class _Given(Exception):
    """What a language model is given: ends a forward where that would begin."""


class VLM(nn.Module):
    """The view of any model in components/models/families.py."""

    model: Any  # transformers' own types do not say what a vision-language model holds

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def features(self, batch: Batch) -> Any:
        """What the vision tower says of the batch's images; None if there are none. No graph is kept through a frozen tower.

        LLaVA's are (N, Nv, D), before the projector, so that models with one tower can share them. Others' are the stock
        output, after the projector, for what lies between differs.
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
    ) -> tuple[Tensor, Kept | None]:
        """One pass over the sequence. Returns hidden states (B, T, d) and, if `keep`, what `continued` continues over.

        Without a mask: padding is on the right, where no real token sees it, and the fused causal kernel is the faster one.
        `change` changes what the language model is given.
        """
        seen: dict[str, Any] = {}

        def look(given: dict[str, Any]) -> None:
            if change is not None:
                change(given)
            seen.update(given)

        # A cache that knows of no layer's window: it would keep the last keys only, and alternatives stand further back.
        cache = DynamicCache() if keep else None
        out = self._stock(batch, features, look, **{CACHE: cache}, use_cache=keep)
        if cache is None:
            return out.last_hidden_state, None
        return out.last_hidden_state, Kept(cache, seen.get("position_ids"), self._masks(seen))

    def continued(self, kept: Kept, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """(B, E, d) hidden states of `tokens`, each in place of the gold token at its position, over the plain pass's keys and
        values; each sees what the (B, 1, E, T + E) `mask` allows of what that gold token saw.
        """
        embedded = self.model.get_input_embeddings()(tokens)
        if not tokens.shape[1]:
            return embedded  # no rows, which attention layers do not take
        return self.model.get_decoder()(
            inputs_embeds=embedded,
            **{CACHE: kept.cache},
            attention_mask=_each(kept.masks, lambda gold: _additive(_of_rows(mask, gold, positions), embedded.dtype)),
            position_ids=_at(kept.positions, positions),
            use_cache=True,
        ).last_hidden_state

    def expanded(self, batch: Batch, features: Any, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """(B, T + E, d) hidden states of one pass with `tokens` appended, under the (B, 1, T + E, T + E) `mask`."""
        B, T = batch.input_ids.shape

        form = _blocks if self.flexes else _additive

        def join(given: dict[str, Any]) -> None:
            embedded = torch.cat([given["inputs_embeds"], self.model.get_input_embeddings()(tokens)], dim=1)
            masks = self._masks(given)
            gold = given.get("position_ids")
            gold = torch.arange(T, device=tokens.device).expand(B, T) if gold is None else gold
            rows = _at(gold, positions)
            given["inputs_embeds"] = embedded
            given["position_ids"] = torch.cat([gold.expand(*rows.shape[:-1], T), rows], dim=-1)
            given["attention_mask"] = _each(masks, lambda gold: form(_of_all(mask, gold, positions), embedded.dtype))
            if given.get("visual_pos_masks") is not None:  # where features enter deeper layers: not at the rows
                given["visual_pos_masks"] = torch.cat([given["visual_pos_masks"], torch.zeros_like(tokens).bool()], dim=1)

        states: Tensor = self._stock(batch, features, join, use_cache=False).last_hidden_state
        return states

    def embedded(self, batch: Batch, features: Any) -> dict[str, Any]:
        """What the language model is given: `inputs_embeds` (B, T, d), and what enters deeper layers (Qwen3-VL)."""

        def end(given: dict[str, Any]) -> None:
            raise _Given(given)

        try:
            self._stock(batch, features, end, use_cache=False)
        except _Given as found:
            return dict(found.args[0])
        raise AssertionError("no language model was run")

    def mixed(self, batch: Batch, features: Any, other: dict[str, Any], own: Tensor) -> Tensor:
        """(B, T, d) hidden states of a plain pass in which each token is given `own` (B, T) of its embedding, and the rest of
        that of `other`, as `embedded` returns it."""

        def mix(given: dict[str, Any]) -> None:
            share = own.to(given["inputs_embeds"].dtype)
            given["inputs_embeds"] = torch.lerp(other["inputs_embeds"], given["inputs_embeds"], share[..., None])
            if (deeper := given.get("deepstack_visual_embeds")) is not None:
                visual = share[batch.visual][:, None]
                pairs = zip(other["deepstack_visual_embeds"], deeper, strict=True)
                given["deepstack_visual_embeds"] = [torch.lerp(theirs, mine, visual) for theirs, mine in pairs]

        return self.plain(batch, features, False, mix)[0]

    def edited(self, edits: Edits) -> Tensor:
        """(n, T, d) hidden states of the edited samples."""
        other = self.embedded(edits.other, self.features(edits.other))
        return self.mixed(edits.batch, self.features(edits.batch), other, edits.own)

    @contextmanager
    def watched(self, batch: Batch, watch: Watch) -> Iterator[Watched]:
        """While open, one pass over the batch reads what `watch` says, gradients and all.

        Raises ModelError if the model has no such layer, or attends by FlexAttention, which has no maps.
        """
        seen = Watched()
        layers = decoder_layers(self.model)
        depth = len(layers)
        if beyond := sorted({*(map.layer for map in watch.maps), *watch.hidden} - set(range(-depth, depth))):
            raise ModelError(f"a loss term reads layers {beyond} of a model whose layers are 0..{depth - 1}")
        if watch.maps and self.flexes:
            raise ModelError("a loss term reads attention maps, which FlexAttention does not have: set flex_attention to false")
        by_rows: dict[tuple[str, bool], list[Map]] = {}
        for map in watch.maps:
            by_rows.setdefault((map.rows, map.each_row), []).append(map)
        with ExitStack() as stack:
            opened: dict[Map, AttentionProbe] = {}
            for (rows, each_row), maps in by_rows.items():
                probe = AttentionProbe.at(getattr(batch, rows), batch.pictures, each_row, gradients=True)
                opened |= dict.fromkeys(maps, probe)
                stack.enter_context(probing(self.model, [map.layer % depth for map in maps], probe))
            for index in watch.hidden:
                hook = layers[index].register_forward_hook(_keeper(seen.hidden, index))
                stack.callback(hook.remove)
            yield seen
        seen.maps |= {map: probe.seen[map.layer % depth] for map, probe in opened.items()}

    def flex(self) -> None:
        """From now on the language model attends by FlexAttention, whose kernel leaves out the blocks that `expanded`'s mask
        leaves empty: alternatives see no alternatives. Its backward pass needs a GPU. For route "expanded" alone: a cache
        cannot be continued with it."""
        self.model.set_attn_implementation({"text_config": "flex_attention"})

    @property
    def can_flex(self) -> bool:
        """LLaVA-1.5 alone, whose language model makes its masks itself: those that others hand theirs were not tried."""
        return reads_one_layer(self.model)

    @property
    def flexes(self) -> bool:
        return bool(self.model.config.get_text_config()._attn_implementation == "flex_attention")

    @property
    def head(self) -> Head:
        """The head as it is now; `vlm.head(rows)` are its logits."""
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, layer.bias, getattr(self.model.config.get_text_config(), "final_logit_softcapping", None))

    def _stock(self, batch: Batch, features: Any, change: Callable[[dict[str, Any]], None], **options: Any) -> Any:
        """The stock forward, in which `change` reads or changes what the language model is given."""
        tokens: dict[str, Any] = {"input_ids": batch.input_ids}
        if isinstance(features, Tensor):  # LLaVA-1.5: placed here, as the stock check would wait for the device
            projected = self.model.model.multi_modal_projector(features).flatten(0, 1)
            words = self.model.get_input_embeddings()(batch.input_ids)
            tokens = {"inputs_embeds": words.masked_scatter(batch.visual[..., None], projected.to(words.dtype))}
        elif features is not None:
            tokens["mm_encoder_outputs"] = {"image": features}

        def hook(_module: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            change(given)
            return args, given

        handle = self.model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
        try:
            return self.model.model(**tokens, **inputs(self.model, batch), **options)
        finally:
            handle.remove()

    def _masks(self, given: dict[str, Any]) -> Masks:
        """What every row of the plain pass sees, by kind of layer if there are several."""
        masks = given.get("attention_mask")
        if masks is None:
            config = copy(self.model.config.get_text_config())
            if self.flexes:
                config._attn_implementation = "sdpa"  # a mask to read, where FlexAttention has a function
            masks = create_masks_for_generate(config, given["inputs_embeds"], None, None)
        if isinstance(masks, dict) and len(masks) == 1:
            (masks,) = masks.values()
        if isinstance(masks, dict):
            return {kind: _allowed(mask) for kind, mask in masks.items()}
        return _allowed(masks)


def _allowed(mask: Tensor | None) -> Tensor | None:
    """Bool, from what SDPA takes (bool) or eager attention (0, or a large negative number)."""
    return mask if mask is None or mask.dtype == torch.bool else mask == 0


def _each(masks: Masks, made: Callable[[Tensor | None], Tensor | BlockMask]) -> Any:
    return {kind: made(mask) for kind, mask in masks.items()} if isinstance(masks, dict) else made(masks)


def _at(positions: Tensor | None, index: Tensor) -> Tensor:
    """Position ids ([axes,] B or 1, T) at (B, E) indices: ([axes,] B, E)."""
    if positions is None:
        return index
    index = index.expand(*positions.shape[:-2], *index.shape)
    return positions.expand(*index.shape[:-1], -1).gather(-1, index)


def _of_rows(mask: Tensor, gold: Tensor | None, positions: Tensor) -> Tensor:
    """(B, 1, E, T + E): of what `mask` allows, what the gold tokens at (B, E) `positions` see, and the rows themselves."""
    if gold is None:
        return mask
    B, E = positions.shape
    T = gold.shape[-1]
    seen = gold.expand(B, 1, T, T).gather(2, positions[:, None, :, None].expand(B, 1, E, T))
    return torch.cat([mask[..., :T] & seen, mask[..., T:]], dim=-1)


def _of_all(mask: Tensor, gold: Tensor | None, positions: Tensor) -> Tensor:
    """(B, 1, T + E, T + E): gold rows see what they do in the plain pass."""
    if gold is None:
        return mask
    T = gold.shape[-1]
    top = torch.cat([gold.expand(len(mask), 1, T, T), mask[:, :, :T, T:]], dim=-1)
    return torch.cat([top, _of_rows(mask[:, :, T:], gold, positions)], dim=2)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the numbers to add to scores: eager attention would add True as 1, silently."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _blocks(mask: Tensor, _dtype: torch.dtype) -> BlockMask:
    """A (B, 1, Q, K) bool mask as FlexAttention takes it: which blocks are empty, which whole, and the mask for the rest."""
    B, _, Q, K = mask.shape

    def seen(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask[b, 0, q, k]

    return create_block_mask(seen, B, None, Q, K, device=mask.device)


def _keeper(hidden: dict[int, Tensor], layer: int) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that keeps what a layer passes on."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden.setdefault(layer, output[0] if isinstance(output, tuple) else output)

    return hook
