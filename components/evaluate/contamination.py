"""Contamination of the test split by training data: equal pixels, near-duplicate images, equal questions.

Exact: the decoded pixels agree. Near: they look alike (components/dataset/perceptual_hash.py).
"""

from __future__ import annotations

import hashlib
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from components.dataset.perceptual_hash import NEAR, look_of
from components.dataset.shards import CAPTION, Samples
from components.models.template import question_of
from components.records.paths import Split
from components.records.record import Record

LISTED = 50  # pairs named in the report


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
    exact: int  # test images whose pixels are a training image's
    near: int  # others within NEAR bits of one
    verbatim: int  # test questions that an exact or near training image was asked too, word for word
    questions: int
    questions_in_training: int  # test questions that occur in training, about any image
    pairs: list[Pair]  # the exact and the near ones, at most LISTED


def contamination(test: Samples, train: Samples, split: Split) -> Contamination:
    """Compare every image and question of `test` with every one of `train`; one image is held at a time."""
    seen = _Seen.of(train, "contamination: training images")
    asked_in_training = set().union(*seen.questions) if seen.questions else set()
    pairs, questions, known, images = [], 0, 0, 0
    for row in tqdm(range(test.images), desc=f"contamination: {split} images", unit="image"):
        name, pixels, look, asked = _fingerprint(test, row)
        questions += len(asked)
        known += sum(question in asked_in_training for question in asked)
        if pixels is None:
            continue
        images += 1
        twin = seen.by_pixels.get(pixels)
        distances = np.bitwise_count(seen.looks ^ look)
        likest = twin if twin is not None else int(distances.argmin())
        if twin is None and distances[likest] > NEAR:
            continue
        both = sum(question in seen.questions[likest] for question in asked)
        pairs.append(
            Pair(test=name, train=seen.names[likest], bits=int(distances[likest]), exact=twin is not None, questions=both)
        )
    pairs.sort(key=lambda pair: (not pair.exact, pair.bits, pair.test))
    return Contamination(
        split=split,
        images=images,
        train_images=len(seen.names),
        exact=sum(pair.exact for pair in pairs),
        near=sum(not pair.exact for pair in pairs),
        verbatim=sum(pair.questions for pair in pairs),
        questions=questions,
        questions_in_training=known,
        pairs=pairs[:LISTED],
    )


class _Seen:
    """What the training images are, by pixels, by look and by their questions."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.by_pixels: dict[str, int] = {}
        self.looks: NDArray[np.uint64] = np.empty(0, dtype=np.uint64)
        self.questions: list[set[str]] = []

    @classmethod
    def of(cls, samples: Samples, title: str) -> _Seen:
        seen, looks = cls(), []
        for row in tqdm(range(samples.images), desc=title, unit="image"):
            name, pixels, look, asked = _fingerprint(samples, row)
            if pixels is not None:
                seen.by_pixels.setdefault(pixels, len(seen.names))
                seen.names.append(name)
                seen.questions.append(set(asked))
                looks.append(look)
        seen.looks = np.array(looks, dtype=np.uint64)
        return seen


def _fingerprint(samples: Samples, row: int) -> tuple[str, str | None, np.uint64, list[str]]:
    """Image id, sha256 of the pixels, look, and the questions asked of it; no sha256 for text alone."""
    about = samples.about(row)
    asked = [question_of(turn) for sample in about if sample.kind != CAPTION for turn in sample.turns[:1]]
    content = about[0].image
    if content is None:
        return about[0].image_id, None, np.uint64(0), asked
    with Image.open(io.BytesIO(content)) as image:
        rgb = image.convert("RGB")
        digest = hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()
    return about[0].image_id, digest, np.uint64(look_of(rgb)), asked
