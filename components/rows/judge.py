"""Verdict on a row: whether it is a training sample of at most `max_length` tokens for every model of a recipe.

Reads texts and image headers alone, with the tokenizers, templates and image-size rules of training.
"""

from __future__ import annotations

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
VERDICT = np.dtype([("turns", "<u2"), ("tokens", "<i4"), ("response", "<i4")])  # turns: kept ones, 0 if the sample is left out
REMEMBERED = 2**14  # image sizes in the cache of placeholder texts
CUT, RESIZED = "cut", "resized"  # remarks on usable samples; all other reasons mean left out


class Remark(Record):
    """One line of remarks.jsonl: a sample that is left out or changed, with the reason."""

    split: Split
    id: str
    reason: str  # too_long, refused_image or no_sample; or CUT or RESIZED
    detail: str
    turns: int  # turns of the sample
    kept: int


class _Shown(NamedTuple):
    """Placeholders of a sample's images, shortened to one visual token where the others only add to the count."""

    texts: tuple[str, ...]
    more: tuple[int, ...]  # further tokens of each image beyond its text
    stretched: bool


class Judge:
    def __init__(self, folders: Sequence[Path], settings: ModelsSettings) -> None:
        """`folders`: models with different tokenizers, templates or processors (`different`)."""
        self.settings = settings
        template = Template.from_settings(settings.template)
        self.collators = [Collator(load_processor(folder), template, sys.maxsize, train=True) for folder in folders]
        self._shown = lru_cache(REMEMBERED)(self._shown_anew)

    def __call__(
        self, split: Split, samples: Sequence[Sample], sizes: Sequence[Sizes]
    ) -> Iterator[tuple[tuple[int, int, int], Remark | None]]:
        """Verdict and remark of each sample. `sizes`: sizes of its images."""
        together = self._together(samples, sizes)
        for place, (sample, its) in enumerate(zip(samples, sizes, strict=True)):
            try:
                tried = together[place] if together else [self._tried(model, sample, its) for model in self._models]
                verdict, longest = self._within(sample, its, tried)
            except Refusal as left:
                yield (
                    (0, 0, 0),
                    Remark(split=split, id=sample.id, reason=left.reason, detail=left.detail, turns=len(sample.turns), kept=0),
                )
                continue
            yield verdict, self._remark(split, sample, verdict[0], longest, its)

    @property
    def _models(self) -> range:
        return range(len(self.collators))

    def _together(self, samples: Sequence[Sample], sizes: Sequence[Sizes]) -> list[list[np.ndarray]] | None:
        """Lengths of all samples from one batch per model, which is fastest; None if any sample fails."""
        by_model = []
        for model, collator in enumerate(self.collators):
            try:
                shown = [self._images(model, size) for size in sizes]
                encoded = collator.encode(samples, [one.texts for one in shown])
            except (DataError, ModelError, Refusal):
                return None
            by_model.append([_lengths(row, one.more) for row, one in zip(encoded, shown, strict=True)])
        return [list(lengths) for lengths in zip(*by_model, strict=True)]

    def _tried(self, model: int, sample: Sample, sizes: Sizes) -> np.ndarray:
        shown = self._images(model, sizes)
        try:
            (row,) = self.collators[model].encode([sample], [shown.texts])
        except (DataError, ModelError) as error:  # a template may have no place for several images
            raise Refusal("no_sample", str(error)) from None
        return _lengths(row, shown.more)

    def _within(self, sample: Sample, sizes: Sizes, tried: list[np.ndarray]) -> tuple[tuple[int, int, int], int]:
        """Verdict, and token count of the uncut sample. Raises Refusal if it is too long."""
        most, kept = self.settings.max_length, len(sample.turns)
        longest = tokens = max(int(lengths[-1]) for lengths in tried)
        if tokens > most and self.settings.too_long == "cut":
            kept = min(int((lengths[:-2] <= most).sum()) for lengths in tried)
            while kept and tokens > most:  # template text after the last answer may not fit
                shorter = sample.upto(kept)
                tried = [self._tried(model, shorter, sizes[: len(shorter.images)]) for model in self._models]
                tokens = max(int(lengths[-1]) for lengths in tried)
                kept -= tokens > most
        if tokens > most:
            raise Refusal("too_long", f"{tokens:,} tokens; models.max_length is {most:,}")
        return (kept, tokens, max(int(lengths[-2]) for lengths in tried)), longest

    def _remark(self, split: Split, sample: Sample, kept: int, longest: int, sizes: Sizes) -> Remark | None:
        turns = len(sample.turns)
        if kept < turns:
            detail = f"{longest:,} tokens; the first {kept} of {turns} turns are within max_length {self.settings.max_length:,}"
            return Remark(split=split, id=sample.id, reason=CUT, detail=detail, turns=turns, kept=kept)
        if sizes and any(self._shown(model, sizes).stretched for model in self._models):
            detail = f"its image, {_spelt(sizes)} pixels, is stretched to a shape that the processor takes"
            return Remark(split=split, id=sample.id, reason=RESIZED, detail=detail, turns=turns, kept=kept)
        return None

    def _images(self, model: int, sizes: Sizes) -> _Shown:
        try:
            shown = self._shown(model, sizes)
        except RefusedImageError as error:
            raise Refusal("refused_image", str(error)) from None
        if shown.stretched and self.settings.refused_images == "leave_out":
            raise Refusal("refused_image", f"a processor refuses an image of {_spelt(sizes)} pixels")
        return shown

    def _shown_anew(self, model: int, sizes: Sizes) -> _Shown:
        collator = self.collators[model]
        whole, stretched = collator.shown(sizes)
        one = collator.tokenizer.convert_ids_to_tokens(visual_id(collator.processor))
        texts, more = [], []
        for text in whole:
            ids = collator.tokenizer.encode(text, add_special_tokens=False)
            # The text begins and ends with added tokens, so its neighbours tokenize as beside a single one.
            parts = {ids[0], ids[-1]} <= set(collator.tokenizer.added_tokens_decoder)
            texts.append(one if parts else text)
            more.append(len(ids) - 1 if parts else 0)
        return _Shown(tuple(texts), tuple(more), stretched)


def _spelt(sizes: Sizes) -> str:
    return " and ".join(f"{width} x {height}" for width, height in sizes)


def _lengths(row: Encoded, more: tuple[int, ...]) -> np.ndarray:
    """Token counts: up to the end of each answer, of all answers, of the sample; `more`: further tokens of each image."""
    follows = np.append(row.response[1:], False)
    ends = np.flatnonzero(row.response & ~follows) + 1
    before = [sum(more[: row.pictures[:end].max()]) for end in ends]
    return np.array([*(ends + np.array(before, dtype=int)), row.response.sum(), len(row.input_ids) + sum(more)])


def different(folders: Sequence[Path]) -> list[Path]:
    """Model folders, one per distinct set of tokenizer, processor and chat template files."""
    found: dict[str, Path] = {}
    for folder in folders:
        files = [path for pattern in ("*token*", "*processor*", "chat_template*") for path in folder.glob(pattern)]
        found.setdefault(sha256(sorted(set(files))), folder)
    return list(found.values())
