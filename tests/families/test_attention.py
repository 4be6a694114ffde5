"""The instruction-to-vision probe against the attention maps of the whole stock model in eager mode."""

from __future__ import annotations

import pytest
import torch

from components.models.attention import AttentionProbe, attention_layers, probing
from components.models.load import load
from components.models.vlm import VLM
from tests.families import toy
from tests.families.table import documented
from tests.families.test_masks import eager_maps

TITLE = "probe"


def check(family: str) -> str:
    vlm, batch = VLM(load(toy.folder(family), "cpu", torch.float64).model), toy.batch(family)
    layers = list(attention_layers(vlm.model))
    look = AttentionProbe.from_masks(batch.instruction, batch.pictures)
    with torch.no_grad(), probing(vlm.model, layers, look):
        vlm.plain(batch, vlm.features(batch), keep=False)
    for layer, attention in zip(layers, eager_maps(family), strict=True):
        for row in (0, 2, 3):
            numbers = batch.pictures[row]
            parts = []
            for number in range(1, int(numbers.max()) + 1):
                of_image = numbers == number
                after = batch.instruction[row] & (torch.arange(len(of_image)) > of_image.nonzero().max())
                parts.append(attention[row].mean(0)[after][:, of_image].mean(0))
            expected, actual = torch.cat(parts), look.maps[layer][row]
            torch.testing.assert_close(actual[: len(expected)].double(), expected, rtol=1e-5, atol=1e-7)
            assert not actual[len(expected) :].any()
        assert not look.maps[layer][1].any(), "no image, no attention"
    return "eager maps" if vlm.model.config.get_text_config()._attn_implementation == "eager" else "beside fused"


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_equals_the_eager_maps(family: str) -> None:
    assert check(family) == documented(family, TITLE)
