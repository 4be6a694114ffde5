"""Image processors as transformers takes them with torchvision: the tokens of those without it, and nearly their pixels."""

from __future__ import annotations

import pytest

from components.models.image_processor import processed
from components.models.processor import load_processor
from tests.families import toy

pytest.importorskip("torchvision", reason="`make test-vision` makes an environment that has it")


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_torchvision_changes_pixels_a_little_and_no_token(family: str) -> None:
    _, with_pillow = toy.FAMILIES[family]()
    with_torchvision = load_processor(toy.folder(family))
    kinds = [type(processor.image_processor).__name__ for processor in (with_pillow, with_torchvision)]
    assert kinds[0] == f"{kinds[1]}Pil"
    for size in ((40, 20), (16, 16), (200, 130), (13, 61), (640, 480)):
        pillow, torchvision = (processed(processor, toy.image(*size)) for processor in (with_pillow, with_torchvision))
        assert pillow.texts == torchvision.texts
        assert {name: tensor.shape for name, tensor in pillow.tensors.items()} == {
            name: tensor.shape for name, tensor in torchvision.tensors.items()
        }
        off = (pillow.tensors["pixel_values"].float() - torchvision.tensors["pixel_values"].float()).abs()
        assert off.mean() < 0.01 and off.max() < 0.2, "pixels are normalised to about -2..2"
