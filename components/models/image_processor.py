"""Image processor: decoded images -> pixels and placeholder text; which shapes a processor takes, visual tokens per image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from components.dataset.shards import Sample
from components.errors import DataError, ModelError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_INPUTS = ("image_sizes", "image_grid_thw", "pixel_attention_mask", "batch_num_images")
SHORTEST, LONGEST = 56, 100  # minimum side in pixels, maximum aspect; Qwen's processors refuse sides under 28, aspects over 200
MOST_GROWN = 50_000_000  # pixels of an image made larger; at twice as many a processor takes 8.6 GiB


class RefusedImageError(DataError):
    """Image shape that an image processor rejects."""


@dataclass(frozen=True)
class Processed:
    """Image processor output for one sample."""

    texts: tuple[str, ...]  # placeholder text of each image
    tensors: dict[str, Tensor]  # pixel_values and the family's further image inputs

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def decode_first_image(sample: Sample) -> Image.Image:
    """First image of the sample, RGB."""
    return decode_images(sample)[0]


def decode_images(sample: Sample) -> list[Image.Image]:
    """Images of the sample, RGB. Raises DataError naming the sample if one does not decode."""
    from PIL import Image, UnidentifiedImageError

    try:
        return [Image.open(io.BytesIO(image)).convert("RGB") for image in sample.images]
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"sample {sample.id}: image {sample.image_id} does not decode: {error}") from None


def stretched(image: Image.Image) -> Image.Image:
    """Image resized to sides of at least SHORTEST pixels and an aspect of at most LONGEST, which all processors accept.

    Raises RefusedImageError if that makes more than MOST_GROWN pixels of it.
    """
    width, height = image.size
    wide, high = max(width, SHORTEST, -(-height // LONGEST)), max(height, SHORTEST, -(-width // LONGEST))
    if wide * high > max(MOST_GROWN, width * height):
        raise RefusedImageError(f"an image of {width} x {height} pixels is too narrow: stretched, it is {wide:,} x {high:,}")
    return image.resize((wide, high))


def outgrows(processor: Any, size: tuple[int, int]) -> bool:
    """Whether the processor would make more than MOST_GROWN pixels of an image before it crops it, as LLaVA-1.5's does with
    narrow ones: it resizes the shorter side to a fixed length."""
    size_limits = getattr(processor.image_processor, "size", None) or {}
    edge, limit = (size_limits.get(name) for name in ("shortest_edge", "longest_edge"))
    return edge is not None and limit is None and edge**2 * max(size) // min(size) > MOST_GROWN


@cache
def shapes() -> list[Image.Image]:
    """Test images: square, wide, tall, and large enough for tiles."""
    from PIL import Image

    whole = Image.linear_gradient("L").convert("RGB")
    return [whole.resize(size) for size in ((64, 64), (96, 48), (48, 96), (600, 400))]


def processed(processor: Any, *images: Image.Image) -> Processed:
    """Image processor output for one sample, in one call: some families do not split an image that is one of several.

    Raises ModelError if the processor cannot count visual tokens, RefusedImageError if it refuses an image.
    """
    if not hasattr(processor, "replace_image_token"):
        raise ModelError(f"{type(processor).__name__} does not say how many visual tokens an image has")
    options = getattr(processor, "images_kwargs", {})  # overrides of the image processor's defaults
    sizes = " and ".join(f"{image.width} x {image.height}" for image in images)
    if any(outgrows(processor, image.size) for image in images):
        raise RefusedImageError(f"{type(processor).__name__} refuses an image of {sizes} pixels: it is too narrow")
    try:
        several = list(images) if len(images) == 1 else [list(images)]
        output = processor.image_processor(images=several, return_tensors="pt", **options)
    except (ValueError, ZeroDivisionError, RuntimeError) as error:
        raise RefusedImageError(f"{type(processor).__name__} refuses an image of {sizes} pixels: {error}") from None
    try:
        texts = tuple(str(processor.replace_image_token(output, index)) for index in range(len(images)))
    except (TypeError, AttributeError) as error:
        raise ModelError(f"{type(processor).__name__}: its processor_config.json is incomplete: {error}") from None
    return Processed(texts, {name: output[name] for name in ("pixel_values", *IMAGE_INPUTS) if name in output})


def image_text(processor: Any) -> str | None:
    """Placeholder text of an image; None if it depends on the image's shape."""
    texts = {processed(processor, shown).texts for shown in shapes()}
    return texts.pop()[0] if len(texts) == 1 else None


def visual_tokens(processor: Any) -> int | None:
    """Nv: visual tokens per image, measured on the processor; None if it depends on the image's shape."""
    text = image_text(processor)
    return None if text is None else processor.tokenizer.encode(text, add_special_tokens=False).count(visual_id(processor))


def visual_id(processor: Any) -> int:
    """Id of the visual tokens. Gemma 3's `image_token` differs: it precedes them."""
    token_id: int | None = getattr(processor.tokenizer, "image_token_id", None)
    return int(processor.image_token_id) if token_id is None else token_id


def pad_and_concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenation along the first dimension; the others are zero-padded to the largest, as the processors do with tiles."""
    largest = torch.tensor([tensor.shape[1:] for tensor in tensors]).amax(0).tolist()
    padded = []
    for tensor in tensors:
        padding = [target - size for target, size in zip(largest, tensor.shape[1:], strict=True)]
        padded.append(torch.nn.functional.pad(tensor, [n for amount in reversed(padding) for n in (0, amount)]))
    return torch.cat(padded)
