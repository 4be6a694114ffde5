"""Places of an image's visual tokens, and the region of a question (its boxes) projected to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from components.align_ti.batch import Batch
from components.dataset.shards import Box
from components.models.families import family_of
from components.models.image_processor import processed, visual_tokens
from components.models.load import Loaded


def preprocessed_image(processor: Any, image: Image.Image) -> NDArray[np.uint8]:
    """Preprocessed RGB image (H, W, 3): resized and cropped, so that the visual tokens tile it."""
    pixels = processor.image_processor(images=[image], return_tensors="np", do_normalize=False, do_rescale=False)[
        "pixel_values"
    ]
    resized = pixels[0][0] if pixels[0].ndim == 4 else pixels[0]  # first tile, in families with image splitting
    return np.clip(np.moveaxis(resized, 0, -1), 0, 255).astype(np.uint8)


def placed(loaded: Loaded, batch: Batch, attention: NDArray[Any], number: int = 0) -> NDArray[Any] | None:
    """(Nv,) attention of the batch's image `number` as a (rows, columns) grid over the whole image, without the tokens of its
    tiles; None if the tokens' positions are unknown."""
    if (grid := batch.image_inputs.get("image_grid_thw")) is not None:
        merged = loaded.processor.image_processor.merge_size
        return attention.reshape(int(grid[number, 1]) // merged, int(grid[number, 2]) // merged)
    whole, count = family_of(loaded.model.config).whole, len(attention)
    if whole is not None:
        processor = loaded.processor
        names = ("num_image_tokens", "image_seq_length", "image_seq_len")
        count = next((getattr(processor, name) for name in names if getattr(processor, name, None)), None) or _patches(loaded)
        attention = attention[:count] if whole == "first" else attention[-count:]
    side = math.isqrt(count)
    return attention.reshape(side, side) if side * side == len(attention) else None


def _patches(loaded: Loaded) -> int:
    vision = loaded.model.config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2


@dataclass(frozen=True)
class Tiling:
    """Spatial layout of a model's visual tokens in an image."""

    processor: Any
    tokens: int | None  # visual tokens per image; None: depends on the image's shape

    @classmethod
    def of(cls, processor: Any) -> Tiling:
        return cls(processor, visual_tokens(processor))

    def grid(self, image: Image.Image) -> tuple[int, int] | None:
        """(rows, columns) of visual tokens; None if unknown, as with image splitting."""
        if self.tokens is not None:
            side = math.isqrt(self.tokens)
            return (side, side) if side * side == self.tokens else None
        patches = processed(self.processor, image).tensors.get("image_grid_thw")
        if patches is None:
            return None
        merged = self.processor.image_processor.merge_size
        return int(patches[0, 1]) // merged, int(patches[0, 2]) // merged

    def coverage(self, image: Image.Image, boxes: Sequence[Box]) -> NDArray[np.float64] | None:
        """(Nv,) share of each visual token's patch covered by `boxes`, row-major; None without a `grid`."""
        if (shape := self.grid(image)) is None:
            return None
        mask = self.region_mask(image, boxes)
        row_weights, column_weights = (_averages(cells, pixels) for cells, pixels in zip(shape, mask.shape, strict=True))
        return (row_weights @ mask @ column_weights.T).flatten()

    def region_mask(self, image: Image.Image, boxes: Sequence[Box]) -> NDArray[np.float64]:
        """(H, W) mask of the region in the preprocessed image, 1 inside and 0 outside.

        For a fixed grid the mask goes through the model's image processor, which may crop or pad; resampling softens its edges
        as it does the image's. Other families keep the whole image.
        """
        canvas = Image.new("RGB", image.size)
        for left, top, right, bottom in boxes:
            x, y = min(round(left * image.width), image.width - 1), min(round(top * image.height), image.height - 1)
            last = max(x, round(right * image.width) - 1), max(y, round(bottom * image.height) - 1)
            ImageDraw.Draw(canvas).rectangle((x, y, *last), "white")  # Pillow draws the last pixel too
        processed_mask = np.asarray(canvas) if self.tokens is None else preprocessed_image(self.processor, canvas)
        region: NDArray[np.float64] = processed_mask[..., 0] / 255
        return region


def _averages(cells: int, pixels: int) -> NDArray[np.float64]:
    """(cells, pixels) averaging matrix over equal intervals of a line of pixels, with fractional weights at their ends."""
    edges = np.arange(cells + 1) * pixels / cells
    pixel = np.arange(pixels)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return overlap.clip(0) * cells / pixels
