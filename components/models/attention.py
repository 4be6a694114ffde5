"""Attention maps: how much of an instruction's attention falls on each visual token, while the model keeps its fused kernel.

The model runs on an attention function of ours, registered with transformers, that calls its fused SDPA and, only in the
layers being watched, computes softmax(q k) again for the instruction rows alone: (B, heads, Ni, T) instead of
(B, heads, T, T) in every layer. Queries and keys arrive there after rotary embedding and normalisation, so the weights are
the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

IMPLEMENTATION = "alignti_probe"


@dataclass
class Look:
    """Which rows and columns of a batch to look at, and what was seen: layer -> (B, Nv), averaged over heads and rows."""

    rows: Tensor  # (B, Ni) positions of the instruction tokens, padded with -1
    columns: Tensor  # (B, Nv) positions of the visual tokens, padded with -1
    seen: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def at(cls, instruction: Tensor, visual: Tensor) -> Look:
        """From (B, T) bool masks."""
        return cls(_positions(instruction), _positions(visual))


def _positions(mask: Tensor) -> Tensor:
    """(B, T) bool -> (B, most) positions of the true entries in order, padded with -1."""
    counts = mask.sum(1)
    most = int(counts.max())
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return torch.where(torch.arange(most, device=mask.device) < counts[:, None], order, -1)


@contextmanager
def watching(model: Any, layers: list[int], look: Look) -> Iterator[Look]:
    """While open, a forward pass of `model` over the look's batch fills `look.seen` for each of `layers`.

    Args:
        model: a transformers vision-language model; its language model's attention is switched to the probing function
            and stays so (the function is SDPA where nobody looks). The vision tower keeps its own.
    """
    kind = model.config.get_text_config()._attn_implementation
    if kind not in (IMPLEMENTATION, "eager"):
        model.set_attn_implementation({"text_config": IMPLEMENTATION})
    watched = {index: attention for index, attention in attention_layers(model).items() if index in layers}
    if len(watched) != len(layers):
        raise IndexError(f"asked to watch layers {layers}; the model has {len(attention_layers(model))}")
    # Eager: there is no fused kernel to keep (Gemma 2, whose scores are capped), and the whole maps are at hand.
    hooked = watched if kind == "eager" else {}
    handles = [attention.register_forward_hook(_read(look, index)) for index, attention in hooked.items()]
    for attention in watched.values():
        attention._alignti_look = look
    try:
        yield look
    finally:
        for attention in watched.values():
            del attention._alignti_look
        for handle in handles:
            handle.remove()


def attention_layers(model: Any) -> dict[int, Any]:
    """The language model's attention modules by layer index."""
    return {index: layer.self_attn for index, layer in enumerate(model.get_decoder().layers)}


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    look: Look | None = getattr(module, "_alignti_look", None)
    if look is not None:
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        look.seen[module.layer_idx] = _attention(query, key, attention_mask, float(scaling), look)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@torch.no_grad()
def _attention(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, look: Look) -> Tensor:
    """(B, Nv), float32 or wider: softmax(q k) of the instruction rows at the visual columns, mean over heads and rows.

    query (B, H, T, d), key (B, K, T, d), H a multiple of K (grouped heads); mask (B, 1, T, T) bool, or additive, or None
    for plain causal attention.
    """
    B, H, T, d = query.shape
    K = key.shape[1]
    rows = look.rows.clamp_min(0)
    Ni = rows.shape[1]
    asked = query.gather(2, rows[:, None, :, None].expand(B, H, Ni, d)).view(B, K, H // K, Ni, d)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("bkgnd,bktd->bkgnt", asked.to(wide) * scaling, key.to(wide))
    if mask is None:
        allowed = torch.arange(T, device=query.device) <= rows[:, :, None]  # (B, Ni, T)
        scores.masked_fill_(~allowed[:, None, None], -torch.inf)
    else:
        row_mask = mask.expand(B, -1, T, T)[:, 0].gather(1, rows[:, :, None].expand(B, Ni, T))[:, None, None]
        scores = scores.masked_fill(~row_mask, -torch.inf) if mask.dtype == torch.bool else scores + row_mask.to(wide)
    return _at_columns(scores.softmax(-1).mean((1, 2)), look)


def _at_columns(over_heads: Tensor, look: Look) -> Tensor:
    """(B, Nv) of (B, Ni, T): the mean over the look's rows, at its columns."""
    counted = (look.rows >= 0)[:, :, None]
    mean = (over_heads * counted).sum(1) / counted.sum(1).clamp_min(1)
    return mean.gather(1, look.columns.clamp_min(0)) * (look.columns >= 0)


def _read(look: Look, layer: int) -> Callable[[Any, Any, Any], None]:
    """A hook that reads a layer's whole map, (B, H, T, T), after an eager forward."""

    def hook(_module: Any, _args: Any, output: Any) -> None:
        whole = output[1].detach().mean(1)  # (B, T, T)
        rows = look.rows.clamp_min(0)[:, :, None].expand(-1, -1, whole.shape[-1])
        look.seen[layer] = _at_columns(whole.gather(1, rows), look)

    return hook


AttentionInterface.register(IMPLEMENTATION, _forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
