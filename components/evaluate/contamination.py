"""Contamination of the test split by training data: equal pixels, near-duplicate images, equal questions.

Exact: equal decoded pixels. Near: perceptual hashes within NEAR bits (components/dataset/perceptual_hash.py).
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from components.dataset.perceptual_hash import dhash, nearest
from components.dataset.shards import CAPTION, Samples
from components.models.rendered import question_of
from components.records.paths import Split
from components.records.record import Record

MAX_PAIRS = 50  # maximum pairs in the report


class Pair(Record):
    """Nearest training image of a test image, by dHash distance."""

    test: str
    train: str
    bits: int  # Hamming distance of their perceptual hashes
    exact: bool
    questions: int  # questions of the test image also asked of the training image's pixels, word for word


class Contamination(Record):
    split: Split
    images: int
    train_images: int
    exact: int  # test images with the pixels of a training image
    near: int  # other test images within NEAR bits of a training image
    verbatim: int  # test questions that also occur with the exact or near training image, word for word
    questions: int
    questions_in_training: int  # test questions that occur in training, about any image
    pairs: list[Pair]  # exact pairs, then near ones, at most MAX_PAIRS


class _Image(NamedTuple):
    """Image of a split, or a text-only row, whose `pixels` are None."""

    name: str
    pixels: str | None  # sha256
    dhash: int
    questions: list[tuple[str, str]]  # (id of the sample, question)


def contamination(test: Samples, train: Samples, split: Split) -> Contamination:
    """Overlap of all images and questions of `test` with those of `train`; images are decoded one at a time."""
    train_images = [image for image in _images(train, "contamination: training images") if image.pixels]
    test_images = list(_images(test, f"contamination: {split} images", turns=1))  # the first alone is asked
    test_pictures = [image for image in test_images if image.pixels]
    questions = dict(question for image in test_images for question in image.questions)
    trained_on: dict[str | None, set[str]] = defaultdict(set)  # pixels -> questions
    for image in train_images:
        trained_on[image.pixels].update(question for _, question in image.questions)
    train_questions = set().union(*trained_on.values())
    by_pixels = {image.pixels: index for index, image in reversed(list(enumerate(train_images)))}
    hashes = (np.array([image.dhash for image in images], dtype=np.uint64) for images in (test_pictures, train_images))
    nearest_indices, _ = nearest(*hashes)
    pairs, verbatim = [], set[str]()
    for image, nearest_index in zip(test_pictures, nearest_indices.tolist(), strict=True):
        match = by_pixels.get(image.pixels, nearest_index)
        if match >= 0:
            other = train_images[match]
            shared = [id_ for id_, question in image.questions if question in trained_on[other.pixels]]
            verbatim.update(shared)
            bits, exact = (image.dhash ^ other.dhash).bit_count(), image.pixels == other.pixels
            pairs.append(Pair(test=image.name, train=other.name, bits=bits, exact=exact, questions=len(shared)))
    pairs.sort(key=lambda pair: (not pair.exact, pair.bits, pair.test))
    return Contamination(
        split=split,
        images=len(test_pictures),
        train_images=len(train_images),
        exact=sum(pair.exact for pair in pairs),
        near=sum(not pair.exact for pair in pairs),
        verbatim=len(verbatim),
        questions=len(questions),
        questions_in_training=sum(question in train_questions for question in questions.values()),
        pairs=pairs[:MAX_PAIRS],
    )


def _images(samples: Samples, title: str, turns: int | None = None) -> Iterator[_Image]:
    """All images of a split, each with the questions that show it; `turns`: of the first turns of each conversation."""
    for row in tqdm(range(samples.images), desc=title, unit="image"):
        row_samples = samples.about(row)
        questions = [
            (sample.id, question_of(turn), len(sample.upto(number).images))
            for sample in row_samples
            if sample.kind != CAPTION
            for number, turn in enumerate(sample.turns[:turns], 1)
        ]
        if not row_samples[0].images:
            yield _Image(row_samples[0].image_id, None, 0, [(id_, question) for id_, question, _ in questions])
        for number, content in enumerate(row_samples[0].images):
            with Image.open(io.BytesIO(content)) as image:
                rgb = image.convert("RGB")
                digest = hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()
            # A question before the first image counts as the first's.
            about = [(id_, question) for id_, question, shown in questions if number < max(shown, 1)]
            yield _Image(row_samples[0].image_id, digest, dhash(rgb), about)
