"""A LLaVA-like transformers model seen as the method sees it: features, plain pass, continuation, expanded pass, head.

Each view is one call into the stock modules, with the attention masks and position ids of the ribbon; the plain pass equals
the stock forward (tests/models/test_vlm.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import DynamicCache

from components.align_ti.head import Head
from components.align_ti.step import Batch


class VLM(nn.Module):
    """The view of `LlavaForConditionalGeneration` and its like: a vision tower, a projector, a language model, a head."""

    model: Any  # transformers' own types do not say what a vision-language model holds

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def features(self, pixel_values: Tensor | None) -> Tensor | None:
        """(N, 3, H, W) pixels -> (N, Nv, D) features of the tower's chosen layer, before the projector; None for None.

        No graph is kept through a frozen tower.
        """
        if pixel_values is None:
            return None
        config = self.model.config
        tower = self.model.model.vision_tower
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())):
            states = tower(pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
            features: Tensor = states[config.vision_feature_layer]
            return features[:, 1:] if config.vision_feature_select_strategy == "default" else features

    def plain(self, batch: Batch, features: Tensor | None, keep: bool) -> tuple[Tensor, DynamicCache | None]:
        """One causal pass. Returns hidden states (B, T, d) and, if `keep`, the key/value cache to continue over.

        Without a mask: padding is on the right, where no real token sees it, and the fused causal kernel is the faster one.
        """
        out = self.model.model.language_model(inputs_embeds=self._embedded(batch, features), use_cache=keep)
        return out.last_hidden_state, out.past_key_values if keep else None

    def continued(self, cache: DynamicCache, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """(B, E, d) hidden states of `tokens` at `positions`, over the cache, each seeing what (B, 1, E, T + E) `mask` says."""
        embedded = self.model.get_input_embeddings()(tokens)
        if not tokens.shape[1]:
            return embedded  # no rows, which attention layers do not take
        return self.model.model.language_model(
            inputs_embeds=embedded,
            past_key_values=cache,
            attention_mask=_additive(mask, embedded.dtype),
            position_ids=positions,
            use_cache=True,
        ).last_hidden_state

    def expanded(self, batch: Batch, features: Tensor | None, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """(B, T + E, d) hidden states of one pass with `tokens` appended, under the (B, 1, T + E, T + E) `mask`."""
        B, T = batch.input_ids.shape
        gold_positions = torch.arange(T, device=tokens.device).expand(B, T)
        embedded = torch.cat([self._embedded(batch, features), self.model.get_input_embeddings()(tokens)], dim=1)
        return self.model.model.language_model(
            inputs_embeds=embedded,
            attention_mask=_blocks(mask) if self.flexes else _additive(mask, embedded.dtype),
            position_ids=torch.cat([gold_positions, positions], dim=1),
            use_cache=False,
        ).last_hidden_state

    def flex(self) -> None:
        """From now on the language model attends by FlexAttention, whose kernel leaves out the blocks that `expanded`'s mask
        leaves empty: alternatives see no alternatives. Its backward pass needs a GPU. For route "expanded" alone: a cache
        cannot be continued with it."""
        self.model.set_attn_implementation({"text_config": "flex_attention"})

    @property
    def flexes(self) -> bool:
        return bool(self.model.config.get_text_config()._attn_implementation == "flex_attention")

    @property
    def head(self) -> Head:
        """The head as it is now; `vlm.head(rows)` are its logits."""
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, layer.bias, getattr(self.model.config.get_text_config(), "final_logit_softcapping", None))

    def _embedded(self, batch: Batch, features: Tensor | None) -> Tensor:
        """(B, T, d): token embeddings with the projected features at the visual tokens.

        By the batch's own mask, not by token id as the stock forward does: an alternative may happen to be the image token.
        """
        embedded = self.model.get_input_embeddings()(batch.input_ids)
        if features is None:
            return embedded
        projected = self.model.model.multi_modal_projector(features).flatten(0, 1)
        return embedded.masked_scatter(batch.visual[..., None], projected.to(embedded.dtype))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the numbers to add to scores: eager attention would add True as 1, silently."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _blocks(mask: Tensor) -> BlockMask:
    """A (B, 1, Q, K) bool mask as FlexAttention takes it: which blocks are empty, which whole, and the mask for the rest."""
    B, _, Q, K = mask.shape

    def seen(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask[b, 0, q, k]

    return create_block_mask(seen, B, None, Q, K, device=mask.device)
