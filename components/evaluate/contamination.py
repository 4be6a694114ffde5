"""Contamination of the test split by training data: equal pixels, near-duplicate images, equal questions.

Exact: equal decoded pixels. Near: perceptual hashes within NEAR bits (components/dataset/perceptual_hash.py).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from components.dataset.perceptual_hash import dhash, nearest
from components.dataset.shards import CAPTION, Samples
from components.models.template import question_of
from components.records.paths import Split
from components.records.record import Record

LISTED = 50  # maximum pairs in the report


class Pair(Record):
    """Nearest training image of a test image, by dHash distance."""

    test: str
    train: str
    bits: int  # Hamming distance of their perceptual hashes
    exact: bool
    questions: int  # questions of the test image also asked of that training image, word for word


class Contamination(Record):
    split: Split
    images: int
    train_images: int
    exact: int  # test images with the pixels of a training image
    near: int  # other test images within NEAR bits of a training image
    verbatim: int  # test questions that also occur with the exact or near training image, word for word
    questions: int
    questions_in_training: int  # test questions that occur in training, about any image
    pairs: list[Pair]  # exact pairs, then near ones, at most LISTED


class _Image(NamedTuple):
    """Image of a split, or a text-only row, whose `pixels` are None."""

    name: str
    pixels: str | None  # sha256
    dhash: int
    questions: list[str]


def contamination(test: Samples, train: Samples, split: Split) -> Contamination:
    """Overlap of all images and questions of `test` with those of `train`; images are decoded one at a time."""
    seen = [image for image in _images(train, "contamination: training images") if image.pixels]
    here = list(_images(test, f"contamination: {split} images"))
    pictured = [image for image in here if image.pixels]
    questions = [question for image in here for question in image.questions]
    asked_in_training = {question for image in seen for question in image.questions}
    by_pixels = {image.pixels: index for index, image in reversed(list(enumerate(seen)))}
    hashes = (np.array([image.dhash for image in images], dtype=np.uint64) for images in (pictured, seen))
    near, _ = nearest(*hashes)
    pairs = []
    for image, likest in zip(pictured, near.tolist(), strict=True):
        twin = by_pixels.get(image.pixels, likest)
        if twin >= 0:
            other = seen[twin]
            both = sum(question in other.questions for question in image.questions)
            bits, exact = (image.dhash ^ other.dhash).bit_count(), image.pixels == other.pixels
            pairs.append(Pair(test=image.name, train=other.name, bits=bits, exact=exact, questions=both))
    pairs.sort(key=lambda pair: (not pair.exact, pair.bits, pair.test))
    return Contamination(
        split=split,
        images=len(pictured),
        train_images=len(seen),
        exact=sum(pair.exact for pair in pairs),
        near=sum(not pair.exact for pair in pairs),
        verbatim=sum(pair.questions for pair in pairs),
        questions=len(questions),
        questions_in_training=sum(question in asked_in_training for question in questions),
        pairs=pairs[:LISTED],
    )


def _images(samples: Samples, title: str) -> Iterator[_Image]:
    """All images of a split; the questions of a row are attached to its first."""
    for row in tqdm(range(samples.images), desc=title, unit="image"):
        about = samples.about(row)
        asked = [question_of(turn) for sample in about if sample.kind != CAPTION for turn in sample.turns[:1]]
        if not about[0].images:
            yield _Image(about[0].image_id, None, 0, asked)
        for number, content in enumerate(about[0].images):
            with Image.open(io.BytesIO(content)) as image:
                rgb = image.convert("RGB")
                digest = hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()
            yield _Image(about[0].image_id, digest, dhash(rgb), asked if number == 0 else [])
