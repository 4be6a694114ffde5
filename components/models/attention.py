"""Attention maps: attention of selected rows to each visual token, while the model keeps its fused kernel.

A custom attention function, registered with transformers, calls the fused SDPA and, only in the probed layers, recomputes
softmax(q k) for the selected rows: (B, heads, Nr, T) instead of (B, heads, T, T) in every layer. Queries and keys arrive
there after rotary embedding and normalisation, so the weights are the model's own.

Under gradient checkpointing a layer runs again in the backward pass and has to save the same tensors, which torch checks;
`recomputing` opens the same probes there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from components.align_ti.batch import by_column

IMPLEMENTATION = "alignti_probe"


@dataclass(eq=False)
class AttentionProbe:
    """Rows and columns of a batch to read, and the maps: layer -> (B, Nc), averaged over heads and, for each image's columns,
    over the rows after its first token.

    Args:
        each_row: no mean over rows: (B, Nr, Nc), zeros where a sample has fewer rows.
        gradients: keep the maps in the autograd graph of the pass.
    """

    rows: Tensor  # (B, Nr) positions, padded with -1
    columns: Tensor  # (B, Nc) positions of visual tokens, padded with -1
    pictures: Tensor  # (B, Nc) image number of each within its sample, from 1, padded with 0
    images: int  # maximum per sample
    maps: dict[int, Tensor] = field(default_factory=dict)
    each_row: bool = False
    gradients: bool = False

    @classmethod
    def from_masks(cls, rows: Tensor, pictures: Tensor, each_row: bool = False, gradients: bool = False) -> AttentionProbe:
        """Probe from a (B, T) bool mask of rows and the batch's image numbers (B, T)."""
        images = int(pictures.max())
        return cls(
            _positions(rows), _positions(pictures > 0), by_column(pictures), images, each_row=each_row, gradients=gradients
        )

    def store(self, layer: int, mean_map: Tensor) -> None:
        """Store the columns of a (B, Nr, T) map, a mean over heads. If the layer runs again, its first map is kept."""
        valid_rows = (self.rows >= 0)[:, :, None]
        columns = self.columns[:, None, :].clamp_min(0)
        if self.each_row:
            columns = columns.expand(-1, valid_rows.shape[1], -1)
            self.maps.setdefault(layer, (mean_map * valid_rows).gather(2, columns) * (self.pictures > 0)[:, None])
            return
        visual_map = mean_map.new_zeros(self.columns.shape)
        for image in range(1, self.images + 1):
            in_image = self.pictures == image
            image_start = self.columns.masked_fill(~in_image, torch.iinfo(self.columns.dtype).max).amin(1, keepdim=True)
            rows_after = (self.rows >= image_start)[:, :, None]
            mean = (mean_map * rows_after).sum(1, keepdim=True) / rows_after.sum(1, keepdim=True).clamp_min(1)
            visual_map = visual_map + mean.gather(2, columns)[:, 0] * in_image
        self.maps.setdefault(layer, visual_map)


def _positions(mask: Tensor) -> Tensor:
    """(B, T) bool -> (B, most) positions of the true entries in order, padded with -1."""
    counts = mask.sum(1)
    max_count = int(counts.max())
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :max_count]
    return torch.where(torch.arange(max_count, device=mask.device) < counts[:, None], order, -1)


@contextmanager
def probing(model: Any, layers: list[int], probe: AttentionProbe) -> Iterator[AttentionProbe]:
    """Context in which a forward pass over the probe's batch fills `probe.maps` for each of `layers`. Contexts nest.

    Args:
        model: a transformers vision-language model; its language model is switched to the probing attention function
            and stays so (plain SDPA without a probe). The vision tower keeps its own.
    """
    implementation = model.config.get_text_config()._attn_implementation
    if implementation not in (IMPLEMENTATION, "eager"):
        model.set_attn_implementation({"text_config": IMPLEMENTATION})
    modules = attention_layers(model)
    if not set(layers) <= set(modules):
        raise IndexError(f"asked to watch layers {layers}; the model has {len(modules)}")
    with _AttachedProbes(model, {modules[index]: [*_probes(modules[index]), probe] for index in layers}):
        yield probe


def recomputing(model: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch.utils.checkpoint: reopens the current probes in the backward pass."""
    return nullcontext(), _AttachedProbes(model, {m: _probes(m) for m in attention_layers(model).values() if _probes(m)})


class _AttachedProbes(AbstractContextManager[None]):
    """Context that attaches probes to attention modules."""

    def __init__(self, model: Any, probes: dict[Any, list[AttentionProbe]]) -> None:
        # Eager (Gemma 2, whose scores are capped): no fused kernel to keep, and forward returns the full maps.
        self._eager = model.config.get_text_config()._attn_implementation == "eager"
        self._probes = probes

    def __enter__(self) -> None:
        self._previous = {module: _probes(module) for module in self._probes}
        unhooked = [module for module, probes in self._previous.items() if self._eager and not probes]
        self._hooks = [module.register_forward_hook(_read_full_map) for module in unhooked]
        for module, probes in self._probes.items():
            module._alignti_probes = probes

    def __exit__(self, *_: object) -> None:
        for module, probes in self._previous.items():
            module._alignti_probes = probes
        for hook in self._hooks:
            hook.remove()


def _probes(attention: Any) -> list[AttentionProbe]:
    probes: list[AttentionProbe] = getattr(attention, "_alignti_probes", [])
    return probes


def decoder_layers(model: Any) -> Any:
    """Decoder layers of the language model, in order."""
    return model.get_decoder().layers


def attention_layers(model: Any) -> dict[int, Any]:
    """Attention modules of the language model by layer index."""
    return {index: layer.self_attn for index, layer in enumerate(decoder_layers(model))}


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    for probe in _probes(module):
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        with torch.set_grad_enabled(probe.gradients and torch.is_grad_enabled()):
            probe.store(module.layer_idx, _attention(query, key, attention_mask, float(scaling), probe.rows))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _attention(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, rows: Tensor) -> Tensor:
    """(B, Nr, T) attention at the (B, Nr) rows, mean over heads, float32 or wider.

    query (B, H, T, d), key (B, K, T, d), H a multiple of K (grouped heads); mask (B, 1, T, T) bool, or additive, or None
    for plain causal attention.
    """
    B, H, T, d = query.shape
    K = key.shape[1]
    rows = rows.clamp_min(0)
    Nr = rows.shape[1]
    queries = query.gather(2, rows[:, None, :, None].expand(B, H, Nr, d)).view(B, K, H // K, Nr, d)
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("bkgnd,bktd->bkgnt", queries.to(compute_dtype) * scaling, key.to(compute_dtype))
    if mask is None:
        allowed = torch.arange(T, device=query.device) <= rows[:, :, None]  # (B, Nr, T)
        scores = scores.masked_fill(~allowed[:, None, None], -torch.inf)
    else:
        row_mask = mask.expand(B, -1, T, T)[:, 0].gather(1, rows[:, :, None].expand(B, Nr, T))[:, None, None]
        scores = scores.masked_fill(~row_mask, -torch.inf) if mask.dtype == torch.bool else scores + row_mask.to(compute_dtype)
    return scores.softmax(-1).mean((1, 2))


def _read_full_map(attention: Any, _args: Any, output: Any) -> None:
    """Forward hook that reads a layer's full map, (B, H, T, T), after eager attention."""
    for probe in _probes(attention):
        with torch.set_grad_enabled(probe.gradients and torch.is_grad_enabled()):
            full_map = output[1].mean(1)  # (B, T, T)
            rows = probe.rows.clamp_min(0)[:, :, None].expand(-1, -1, full_map.shape[-1])
            probe.store(attention.layer_idx, full_map.gather(1, rows))


AttentionInterface.register(IMPLEMENTATION, _forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
