"""Several images in one sample, as the family's own processor writes them: the method's view of the model takes them."""

from __future__ import annotations

import pytest
import torch

from components.models.collate import IMAGE_INPUTS, Batch, visual_id
from components.models.families import inputs
from components.models.vlm import VLM
from tests.families import toy
from tests.families.table import documented
from tests.families.test_visual_tokens import entering

TITLE = "several images"


def batch_of(family: str, seeds: tuple[int, int]) -> Batch:
    processor = toy.loaded(family).processor
    images = [toy.image(40, 20, seeds[0]), toy.image(20, 40, seeds[1])]
    text = f"one {processor.image_token} {processor.tokenizer.eos_token} {processor.image_token} red"
    made = processor(images=[images], text=[text], return_tensors="pt")
    ids = made["input_ids"]
    nothing = torch.zeros_like(ids).bool()
    return Batch(
        ids=["several"],
        image_ids=["a", "b"],
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        response=nothing,
        instruction=nothing,
        visual=ids == visual_id(processor),
        pixel_values=made["pixel_values"].double(),
        image_inputs={name: made[name] for name in IMAGE_INPUTS if name in made},
    )


def check(family: str) -> str:
    vlm = VLM(toy.loaded(family).model)
    first, other = batch_of(family, (1, 2)), batch_of(family, (1, 3))
    assert torch.equal(first.input_ids, other.input_ids)
    with torch.no_grad():
        hidden, _ = vlm.plain(first, vlm.features(first), keep=False)
        stock = vlm.model(
            input_ids=first.input_ids,
            attention_mask=first.attention_mask,
            pixel_values=first.pixel_values,
            **inputs(vlm.model, first),
        ).logits
        torch.testing.assert_close(vlm.head(hidden).double(), stock, rtol=1e-5, atol=1e-5)
        one, two = (entering(vlm, batch, vlm.features(batch)) for batch in (first, other))
    changed = (one != two).any(-1)[0]
    positions = first.visual[0].nonzero()[:, 0]
    between = int((first.input_ids[0] == toy.loaded(family).processor.tokenizer.eos_token_id).nonzero()[0, 0])
    # Another second image changes its own tokens: all of those behind the token between the images, and no other. A row of
    # LLaVA-NeXT's ends in a token that is the same in every image.
    assert not changed[:between].any() and not changed[~first.visual[0]].any()
    assert changed[positions[positions > between]].float().mean() > 0.6
    assert (positions < between).sum() > 1
    return "yes"


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_each_images_tokens_are_its_own(family: str) -> None:
    assert check(family) == documented(family, TITLE)
