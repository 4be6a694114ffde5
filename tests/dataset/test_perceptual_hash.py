"""What pictures look like, and the search for those that look alike against comparing all with all."""

from __future__ import annotations

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from components.dataset.perceptual_hash import NEAR, dhash, nearest


def picture(seed: int, px: int = 48) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((px, px), Image.Resampling.BICUBIC)


def recoded(image: Image.Image, quality: int = 60) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def differ(first: Image.Image, second: Image.Image) -> int:
    return (dhash(first) ^ dhash(second)).bit_count()


def test_the_look_survives_a_small_change_and_tells_pictures_apart() -> None:
    for px in (48, 600):
        image = picture(1, px)
        darker = image.point(lambda value: int(0.8 * value))
        assert differ(image, recoded(darker)) <= NEAR
        assert differ(image, image.resize((px * 2 // 3, px * 3 // 4), Image.Resampling.LANCZOS)) <= NEAR
        assert min(differ(image, picture(seed, px)) for seed in range(2, 40)) > NEAR


@given(
    among=st.lists(st.integers(0, 2**64 - 1), max_size=20),
    changed=st.lists(st.tuples(st.integers(0, 19), st.sets(st.integers(0, 63), max_size=5)), max_size=20),
    strangers=st.lists(st.integers(0, 2**64 - 1), max_size=5),
)
@settings(max_examples=60)
def test_the_search_finds_what_comparing_all_with_all_does(
    among: list[int], changed: list[tuple[int, set[int]]], strangers: list[int]
) -> None:
    looks = [among[which % len(among)] ^ sum(1 << bit for bit in bits) for which, bits in changed if among] + strangers
    indices, bits = nearest(np.array(looks, dtype=np.uint64), np.array(among, dtype=np.uint64))
    for look, index, distance in zip(looks, indices, bits, strict=True):
        least = min(((look ^ other).bit_count(), position) for position, other in enumerate(among)) if among else (65, -1)
        assert (distance, index) == (least if least[0] <= NEAR else (NEAR + 1, -1))
