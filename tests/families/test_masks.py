"""What every row sees, layer by layer, against the attention of the whole stock model in eager mode."""

from __future__ import annotations

import pytest
import torch

from components.models.families import inputs
from components.models.load import load
from components.models.vlm import VLM
from tests.families import toy
from tests.families.table import documented

TITLE = "masks"


def eager_maps(family: str) -> tuple[torch.Tensor, ...]:
    """Per layer (B, H, T, T), of real rows. Without a padding mask: added to a score, the least number overflows."""
    model = load(toy.folder(family), "cpu", torch.float64).model
    model.set_attn_implementation("eager")
    batch = toy.batch(family)
    with torch.no_grad():
        return model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            output_attentions=True,
            **inputs(model, batch),
        ).attentions


def check(family: str) -> str:
    vlm, batch = VLM(toy.loaded(family).model), toy.batch(family)
    with torch.no_grad():
        _, cache = vlm.plain(batch, vlm.features(batch), keep=True)
    B, T = batch.input_ids.shape
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
    text = vlm.model.config.get_text_config()
    ahead, window = torch.zeros(B, T, T, dtype=torch.bool), False
    for layer, attention in enumerate(eager_maps(family)):
        mask = cache.masks[text.layer_types[layer]] if isinstance(cache.masks, dict) else cache.masks
        allowed = causal if mask is None else mask.expand(B, 1, T, T)[:, 0]
        for row, real in enumerate(batch.attention_mask.sum(1).tolist()):
            assert torch.equal(allowed[row, :real, :real], (attention[row, :, :real, :real] > 0).any(0))
        ahead |= allowed & ~causal
        window |= bool((~allowed & causal).any())
    if not ahead.any():
        return "causal" + (", windows" if window else "")
    of_image = (batch.visual[:, :, None] & batch.visual[:, None, :])[ahead].all()
    prompt = (batch.response.cumsum(1) == 0) & (batch.attention_mask == 1)
    assert of_image or (prompt[:, :, None] & prompt[:, None, :])[ahead].all()
    return ("an image's tokens see each other" if of_image else "the prompt sees itself whole") + (
        ", windows" if window else ""
    )


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_equal_what_eager_attention_lets_see(family: str) -> None:
    assert check(family) == documented(family, TITLE)
