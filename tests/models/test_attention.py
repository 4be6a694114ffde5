"""The probe against the attention maps of the whole model in eager mode."""

from __future__ import annotations

import pytest
import torch

from components.models.attention import IMPLEMENTATION, AttentionProbe, probing
from components.models.vlm import VLM
from tests import tiny

SAMPLES = [(1, 3, 2), (0, 4, 2), (1, 1, 4)]


def probed(vlm: VLM, b, layers: list[int]) -> dict[int, torch.Tensor]:
    look = AttentionProbe.from_masks(b.instruction, b.pictures)
    with torch.no_grad(), probing(vlm.model, layers, look):
        vlm.plain(b, vlm.features(b), keep=False)
    return look.maps


def eager_maps(vlm: VLM, b) -> list[torch.Tensor]:
    """Per layer (B, Nv): instruction rows x visual columns, averaged over heads and rows."""
    vlm.model.set_attn_implementation("eager")
    with torch.no_grad():
        out = vlm.model(
            input_ids=b.input_ids, pixel_values=b.pixel_values, attention_mask=b.attention_mask, output_attentions=True
        )
    maps = []
    for attention in out.attentions:
        rows = torch.zeros(len(b.input_ids), tiny.NV)
        for i in range(len(b.input_ids)):
            if b.visual[i].any():
                rows[i] = attention[i].mean(0)[b.instruction[i]][:, b.visual[i]].mean(0)
        maps.append(rows)
    return maps


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("samples", [SAMPLES, [(1, 3, 2), (1, 3, 2)]], ids=["padded", "unpadded"])
def test_equals_eager_attention_under_grouped_heads_and_rotary(family: str, samples: list) -> None:
    """Unpadded batches reach the kernel without a mask: the probe has to be causal by itself."""
    vlm = VLM(tiny.llava(family, 3, layers=3))
    b = tiny.batch(samples)
    maps = probed(vlm, b, [0, 1, 2])
    for layer, expected in enumerate(eager_maps(vlm, b)):
        torch.testing.assert_close(maps[layer], expected, rtol=1e-4, atol=1e-6)


def test_sliding_window_is_respected() -> None:
    vlm = VLM(tiny.llava("qwen2", 3, use_sliding_window=True, sliding_window=4, max_window_layers=0))
    b = tiny.batch(SAMPLES)
    maps = probed(vlm, b, [0, 1])
    for layer, expected in enumerate(eager_maps(vlm, b)):
        torch.testing.assert_close(maps[layer], expected, rtol=1e-4, atol=1e-6)
    assert maps[0][0, 0] == 0 < maps[0][0, -1]  # the window hides the first visual token and not the last


def test_watching_leaves_the_outputs_alone_and_only_watched_layers_are_seen() -> None:
    vlm = VLM(tiny.llava("qwen3", 5))
    b = tiny.batch(SAMPLES)
    with torch.no_grad():
        features = vlm.features(b)
        unprobed, _ = vlm.plain(b, features, keep=False)
        probe = AttentionProbe.from_masks(b.instruction, b.pictures)
        with probing(vlm.model, [1], probe):
            probed_output, _ = vlm.plain(b, features, keep=False)
        unprobed_again, _ = vlm.plain(b, features, keep=False)
    torch.testing.assert_close(probed_output, unprobed)
    torch.testing.assert_close(unprobed_again, unprobed)
    assert list(probe.maps) == [1]
    assert vlm.model.config.get_text_config()._attn_implementation == IMPLEMENTATION
    assert vlm.model.config.vision_config._attn_implementation == "sdpa"


def test_a_layer_that_is_not_there_is_refused() -> None:
    vlm = VLM(tiny.llava("qwen2", 5))
    b = tiny.batch(SAMPLES)
    with pytest.raises(IndexError, match=r"layers \[7\]; the model has 2"):
        probed(vlm, b, [7])
