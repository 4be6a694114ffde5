"""Regions among visual tokens: against counting pixels, through crops, and on grids that go by the image's shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor

from components.digits.tokenizer import build_processor
from components.irs.regions import Tiling, preprocessed_image
from components.models.template import Template
from tests.families import toy

PX, PATCH = 32, 8
TILING = Tiling.of(build_processor(["what"], Template(""), PX, PATCH))
IMAGE = Image.new("RGB", (PX, PX))
SIDE = st.integers(0, PX - 1).flatmap(lambda low: st.integers(low + 1, PX).map(lambda high: (low, high)))


def test_a_cell_is_its_own_tokens() -> None:
    share = TILING.coverage(IMAGE, [(0.5, 0.0, 1.0, 0.5)])
    assert share is not None
    assert share.reshape(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[0] * 4] * 2


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=3))
@settings(max_examples=50)
def test_shares_equal_a_count_of_pixels_and_overlapping_boxes_count_once(sides: list) -> None:
    inside = np.zeros((PX, PX))
    for (left, right), (top, bottom) in sides:
        inside[top:bottom, left:right] = 1
    boxes = [(left / PX, top / PX, right / PX, bottom / PX) for (left, right), (top, bottom) in sides]
    expected = [inside[y : y + PATCH, x : x + PATCH].mean() for y in range(0, PX, PATCH) for x in range(0, PX, PATCH)]
    np.testing.assert_allclose(TILING.coverage(IMAGE, boxes), expected, atol=1e-12)


def test_a_box_smaller_than_a_pixel_is_still_somewhere() -> None:
    share = TILING.coverage(IMAGE, [(0.9999, 0.9999, 1.0, 1.0)])
    assert share is not None and share.argmax() == 15 and share.sum() == pytest.approx(1 / PATCH**2)


def test_the_region_is_cropped_as_the_image_is() -> None:
    """A picture twice as wide as high, of which the model sees the middle half."""
    processor = build_processor(["what"], Template(""), PX, PATCH)
    processor.image_processor = CLIPImageProcessor(
        do_center_crop=True, size={"shortest_edge": PX}, crop_size={"height": PX, "width": PX}
    )
    tiling, image = Tiling(processor, 16), Image.new("RGB", (80, 40))
    assert preprocessed_image(processor, image).shape == (PX, PX, 3)
    beside, inside = (tiling.coverage(image, [box]) for box in ((0.0, 0.0, 0.2, 1.0), (0.25, 0.0, 0.5, 1.0)))
    assert beside is not None and not beside.any()
    assert inside is not None
    np.testing.assert_allclose(inside.reshape(4, 4).mean(0), [1, 1, 0, 0], atol=0.05)


def test_a_grid_that_goes_by_the_images_shape() -> None:
    tiling, image = Tiling.of(toy.loaded("qwen2_vl").processor), toy.image(40, 20)
    assert tiling.tokens is None
    grid = tiling.grid(image)
    assert grid is not None and grid[0] < grid[1]
    share = tiling.coverage(image, [(0.0, 0.0, 0.5, 1.0)])
    assert share is not None and share.mean() == pytest.approx(0.5)
    assert share.reshape(grid)[:, 0].tolist() == pytest.approx([1] * grid[0])


def test_where_tiles_lie_is_not_known() -> None:
    tiling, image = Tiling.of(toy.loaded("llava_next").processor), toy.image(40, 20)
    assert tiling.grid(image) is None and tiling.coverage(image, [(0, 0, 1, 1)]) is None
