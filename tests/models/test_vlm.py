"""The method's view of a model equals the stock forward pass."""

from __future__ import annotations

import pytest
import torch

from components.models.vlm import VLM
from tests import tiny


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_plain_pass_and_head_equal_the_stock_forward(family: str, layer: int) -> None:
    model = tiny.llava(family, 1)
    model.config.vision_feature_layer = model.model.config.vision_feature_layer = layer
    b = tiny.batch([(1, 3, 4), (0, 2, 3), (1, 5, 2)])
    vlm = VLM(model)
    with torch.no_grad():
        hidden, cache = vlm.plain(b, vlm.features(b), keep=True)
        stock = model(input_ids=b.input_ids, pixel_values=b.pixel_values, attention_mask=b.attention_mask).logits
    real = b.attention_mask.bool()
    torch.testing.assert_close(vlm.head(hidden[real]), stock[real], rtol=1e-5, atol=1e-5)
    assert cache is not None and cache.cache.get_seq_length() == b.input_ids.shape[1]


def test_a_frozen_tower_keeps_no_graph_and_a_trained_one_does() -> None:
    vlm = VLM(tiny.llava("qwen2", 1))
    b = tiny.batch([(1, 1, 1)])
    assert vlm.features(b).requires_grad
    vlm.model.model.vision_tower.requires_grad_(False)
    assert not vlm.features(b).requires_grad
    assert vlm.features(tiny.batch([(0, 1, 1)])) is None


def test_the_head_computes_in_float32_from_bf16_operands_even_under_autocast() -> None:
    """Liger issue 1432: a bf16 product cast to float32 afterwards is not that."""
    vlm = VLM(tiny.llava("qwen2", 1).to(torch.bfloat16))
    rows = torch.randn(7, 32).to(torch.bfloat16)
    weight = vlm.model.get_output_embeddings().weight
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = vlm.head(rows)
    torch.testing.assert_close(logits, rows.double().matmul(weight.double().T).float(), rtol=1e-5, atol=1e-5)


def test_soft_capping_is_applied() -> None:
    vlm = VLM(tiny.llava("qwen2", 1))
    rows = torch.randn(5, 32)
    plain = vlm.head(rows)
    vlm.model.config.text_config.final_logit_softcapping = 2.0
    torch.testing.assert_close(vlm.head(rows), 2.0 * torch.tanh(plain / 2.0))
