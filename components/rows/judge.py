"""Verdict on a row: whether it is a training sample of at most `max_length` tokens for every model of a recipe.

Reads texts and image headers alone, with the tokenizers, templates and image-size rules of training.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from components.config.models import ModelsSettings
from components.dataset.shards import Sample
from components.errors import DataError, ModelError, Refusal
from components.io import sha256
from components.models.collate import Collator, Encoded
from components.models.image_processor import RefusedImageError, visual_id
from components.models.processor import load_processor
from components.models.template import Template
from components.records.paths import Split
from components.records.record import Record

Sizes = tuple[tuple[int, int], ...]  # width and height of each image of a sample
VERDICT = np.dtype([("turns", "<u2"), ("tokens", "<i4"), ("response", "<i4")])  # turns: retained; 0: left out
CACHED_SIZES = 2**14  # image sizes in the cache of placeholder texts
ENCODING = ("*token*", "vocab*", "merges*", "*.model", "*processor*", "chat_template*")  # files of a model's folder
CUT, RESIZED = "cut", "resized"  # issues of usable samples; a sample with any other reason is left out


class Issue(Record):
    """One line of remarks.jsonl: a sample that is left out or changed, with the reason."""

    split: Split
    id: str
    reason: str  # too_long, refused_image or no_sample; or CUT or RESIZED
    detail: str
    turns: int  # turns of the sample
    kept: int  # turns retained


class _Placeholders(NamedTuple):
    """Placeholders of a sample's images, each run of visual tokens shortened to one: the others only add to the count."""

    texts: tuple[str, ...]
    extra_tokens: tuple[int, ...]  # further tokens of each image beyond its text
    stretched: bool


class Judge:
    def __init__(self, folders: Sequence[Path], settings: ModelsSettings) -> None:
        """`folders`: models with different tokenizers, templates or processors (`distinct_encodings`)."""
        self.settings = settings
        template = Template.from_settings(settings.template)
        self.collators = [Collator(load_processor(folder), template, sys.maxsize, train=True) for folder in folders]
        self._cached_placeholders = lru_cache(CACHED_SIZES)(_render_placeholders)

    def __call__(
        self, split: Split, samples: Sequence[Sample], image_sizes: Sequence[Sizes]
    ) -> Iterator[tuple[tuple[int, int, int], Issue | None]]:
        """Verdict and issue of each sample. `image_sizes`: sizes of its images."""
        batch_lengths = self._batch_lengths(samples, image_sizes)
        for index, (sample, sizes) in enumerate(zip(samples, image_sizes, strict=True)):
            try:
                lengths = (
                    batch_lengths[index] if batch_lengths else [self._sample_lengths(c, sample, sizes) for c in self.collators]
                )
                verdict, uncut_tokens = self._verdict(sample, sizes, lengths)
            except Refusal as error:
                yield (
                    (0, 0, 0),
                    Issue(split=split, id=sample.id, reason=error.reason, detail=error.detail, turns=len(sample.turns), kept=0),
                )
                continue
            yield verdict, self._issue(split, sample, verdict[0], uncut_tokens, sizes)

    def _batch_lengths(self, samples: Sequence[Sample], image_sizes: Sequence[Sizes]) -> list[list[np.ndarray]] | None:
        """Lengths of all samples from one batch per model, which is fastest; None if any sample fails."""
        by_model = []
        for collator in self.collators:
            try:
                placeholders = [self._placeholders(collator, sizes) for sizes in image_sizes]
                encoded = collator.encode(samples, [p.texts for p in placeholders])
            except (DataError, ModelError, Refusal):
                return None
            by_model.append([_lengths(row, p.extra_tokens) for row, p in zip(encoded, placeholders, strict=True)])
        return [list(lengths) for lengths in zip(*by_model, strict=True)]

    def _sample_lengths(self, collator: Collator, sample: Sample, sizes: Sizes) -> np.ndarray:
        placeholders = self._placeholders(collator, sizes)
        try:
            (row,) = collator.encode([sample], [placeholders.texts])
        except (DataError, ModelError) as error:  # a template may have no place for several images
            raise Refusal("no_sample", str(error)) from None
        return _lengths(row, placeholders.extra_tokens)

    def _verdict(self, sample: Sample, sizes: Sizes, lengths: list[np.ndarray]) -> tuple[tuple[int, int, int], int]:
        """Verdict, and token count of the uncut sample. Raises Refusal if it is too long."""
        max_length, turns = self.settings.max_length, len(sample.turns)
        uncut_tokens = tokens = max(int(model_lengths[-1]) for model_lengths in lengths)
        if tokens > max_length and self.settings.too_long == "cut":
            turns = min(int((model_lengths[:-2] <= max_length).sum()) for model_lengths in lengths)
            while turns and tokens > max_length:  # template text after the last answer may not fit
                cut_sample = sample.upto(turns)
                lengths = [self._sample_lengths(c, cut_sample, sizes[: len(cut_sample.images)]) for c in self.collators]
                tokens = max(int(model_lengths[-1]) for model_lengths in lengths)
                turns -= tokens > max_length
        if tokens > max_length:
            raise Refusal("too_long", f"{tokens:,} tokens; models.max_length is {max_length:,}")
        return (turns, tokens, max(int(model_lengths[-2]) for model_lengths in lengths)), uncut_tokens

    def _issue(self, split: Split, sample: Sample, turns_left: int, uncut_tokens: int, sizes: Sizes) -> Issue | None:
        turns, max_length = len(sample.turns), self.settings.max_length
        if turns_left < turns:
            detail = f"{uncut_tokens:,} tokens; the first {turns_left} of {turns} turns are within max_length {max_length:,}"
            return Issue(split=split, id=sample.id, reason=CUT, detail=detail, turns=turns, kept=turns_left)
        if sizes and any(self._cached_placeholders(collator, sizes).stretched for collator in self.collators):
            detail = f"its image, {_format_sizes(sizes)} pixels, is stretched to a shape that the processor takes"
            return Issue(split=split, id=sample.id, reason=RESIZED, detail=detail, turns=turns, kept=turns_left)
        return None

    def _placeholders(self, collator: Collator, sizes: Sizes) -> _Placeholders:
        try:
            placeholders = self._cached_placeholders(collator, sizes)
        except RefusedImageError as error:
            raise Refusal("refused_image", str(error)) from None
        if placeholders.stretched and self.settings.refused_images == "leave_out":
            raise Refusal("refused_image", f"a processor refuses an image of {_format_sizes(sizes)} pixels")
        return placeholders


def _render_placeholders(collator: Collator, sizes: Sizes) -> _Placeholders:
    image_texts, stretched = collator.shown(sizes)
    visual = visual_id(collator.processor)
    token = collator.tokenizer.convert_ids_to_tokens(visual)
    repeated = f"(?:{re.escape(token)})+" if visual in collator.tokenizer.added_tokens_decoder else "(?!)"  # else not apart
    short_texts = tuple(re.sub(repeated, lambda _: token, text) for text in image_texts)
    extra = ((len(text) - len(short)) // len(token) for text, short in zip(image_texts, short_texts, strict=True))
    return _Placeholders(short_texts, tuple(extra), stretched)


def _format_sizes(sizes: Sizes) -> str:
    return " and ".join(f"{width} x {height}" for width, height in sizes)


def _lengths(row: Encoded, extra_tokens: tuple[int, ...]) -> np.ndarray:
    """Token counts: up to the end of each answer, of all answers, of the sample.

    `extra_tokens`: further tokens of each image.
    """
    next_is_response = np.append(row.response[1:], False)
    ends = np.flatnonzero(row.response & ~next_is_response) + 1
    extra_before = [sum(extra_tokens[: row.pictures[:end].max()]) for end in ends]
    return np.array([*(ends + np.array(extra_before, dtype=int)), row.response.sum(), len(row.input_ids) + sum(extra_tokens)])


def distinct_encodings(folders: Sequence[Path]) -> list[Path]:
    """Model folders, one per distinct set of tokenizer, processor and chat template files; older tokenizers have no token in
    their files' names."""
    folder_by_hash: dict[str, Path] = {}
    for folder in folders:
        files = [path for pattern in ENCODING for path in folder.glob(pattern)]
        folder_by_hash.setdefault(sha256(sorted(set(files))), folder)
    return list(folder_by_hash.values())
