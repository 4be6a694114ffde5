"""Which positions are visual tokens of which image: each holds that image's own feature, in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from components.align_ti.image_dependence import EDITS
from components.models.image_processor import visual_tokens
from components.models.vlm import VLM
from tests.families import toy
from tests.families.table import documented

TITLE = "visual tokens"


def entering(vlm: VLM, batch: Any, features: Any) -> torch.Tensor:
    """(B, T, d) embeddings that the language model is given."""
    given: dict[str, Any] = {}
    with torch.no_grad():
        vlm._stock_forward(batch, features, given.update, use_cache=False)
    return given["inputs_embeds"]


def features_of(vlm: VLM, batch: Any) -> torch.Tensor:
    """(N, d) stock features of a batch's images, one after the other."""
    with torch.no_grad():
        features = vlm.model.model.get_image_features(
            pixel_values=batch.pixel_values, return_dict=True, **batch.image_inputs
        ).pooler_output
    return torch.cat([part.flatten(0, -2) for part in features])


def check(family: str) -> str:
    vlm, batch = VLM(toy.loaded(family).model), toy.batch(family)
    with torch.no_grad():
        embedded = entering(vlm, batch, vlm.features(batch))
    words = vlm.model.get_input_embeddings()(batch.input_ids.masked_fill(batch.visual, 0))
    torch.testing.assert_close(embedded[~batch.visual], words[~batch.visual])
    counts = []
    for row in (0, 2):
        features = features_of(vlm, toy.alone(family, row))
        torch.testing.assert_close(embedded[row][batch.visual[row]], features, rtol=1e-6, atol=1e-6)
        assert (features - features[0]).abs().amax(1)[1:].all(), "features of different places differ"
        counts.append(len(features))
    assert not batch.visual[1].any(), "a sample without an image has none"
    fixed = visual_tokens(toy.loaded(family).processor)
    assert (fixed is None) == (len(set(counts)) > 1)
    return "by shape" if fixed is None else "fixed"


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_hold_their_own_images_features(family: str) -> None:
    assert check(family) == documented(family, TITLE)


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_a_batch_without_any_image(family: str) -> None:
    vlm, batch = VLM(toy.loaded(family).model), toy.alone(family, 1)
    assert batch.pixel_values is None and vlm.features(batch) is None
    with torch.no_grad():
        hidden, _ = vlm.plain(batch, None, keep=False)
        stock = vlm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    if family != "paligemma":  # asked without token types, its stock forward lets nothing see ahead
        torch.testing.assert_close(vlm.head(hidden).double(), stock, rtol=1e-5, atol=1e-5)
    assert vlm.head(hidden).isfinite().all()


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", toy.FAMILIES)
def test_an_edited_image_has_as_many(family: str, edit: str) -> None:
    vlm, seen = VLM(toy.loaded(family).model), toy.batch(family)
    batch = EDITS[edit](seen)
    own = features_of(vlm, seen)
    changed = features_of(vlm, batch)
    assert changed.shape == own.shape and (changed - own).abs().max() > 1e-3
