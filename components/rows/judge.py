"""Verdict on one row, read as every model of a recipe would: a training sample of at most `max_length` tokens or not.

Texts and the headers of images alone are looked at, with the very tokenizers, templates and image-size rules that read them in
training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from components.config.models import ModelsSettings
from components.dataset.shards import Sample
from components.errors import DataError
from components.io import sha256
from components.models.collate import Collator, Encoded, RefusedImageError, visual_id
from components.models.processor import load_processor
from components.models.template import Template
from components.records.paths import Split
from components.records.record import Record

VERDICT = np.dtype([("turns", "<u2"), ("tokens", "<i4"), ("response", "<i4")])  # turns kept: 0 if the sample is left out
SIZES = 2**14  # image sizes whose visual tokens are remembered
CUT, RESIZED = "cut", "resized"  # remarks on usable samples; other reasons are of those that are left out


class Remark(Record):
    """One line of remarks.jsonl: a sample that is left out, or changed, and why."""

    split: Split
    id: str
    reason: str  # too_long, refused_image or no_sample; or CUT or RESIZED
    detail: str
    turns: int  # turns of the row
    kept: int


class _LeftOut(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class _Shown(NamedTuple):
    """What stands for an image among the tokens: one of its tokens where only their number matters."""

    text: str
    more: int  # tokens that the image has beyond those of `text`
    stretched: bool


class Judge:
    def __init__(self, folders: Sequence[Path], settings: ModelsSettings) -> None:
        """`folders`: of models that read rows each in its own way (`different`)."""
        self.settings = settings
        template = Template.asked(settings.template)
        self.collators = [Collator(load_processor(folder), template, sys.maxsize, train=True) for folder in folders]
        self._shown = lru_cache(SIZES)(self._shown_anew)

    def __call__(
        self, split: Split, samples: Sequence[Sample], sizes: Sequence[tuple[int, int] | None]
    ) -> Iterator[tuple[tuple[int, int, int], Remark | None]]:
        """Of each sample, whose image has that size, its verdict and what there is to say of it."""
        together = self._together(samples, sizes)
        for place, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
            try:
                tried = together[place] if together else [self._tried(model, sample, size) for model in self._models]
                verdict, longest = self._within(sample, size, tried)
            except _LeftOut as left:
                yield (
                    (0, 0, 0),
                    Remark(split=split, id=sample.id, reason=left.reason, detail=left.detail, turns=len(sample.turns), kept=0),
                )
                continue
            yield verdict, self._remark(split, sample, verdict[0], longest, size)

    @property
    def _models(self) -> range:
        return range(len(self.collators))

    def _together(self, samples: Sequence[Sample], sizes: Sequence[tuple[int, int] | None]) -> list[list[np.ndarray]] | None:
        """All samples tried at once with each model, which is fastest; None if something is wrong with one of them."""
        by_model = []
        for model, collator in enumerate(self.collators):
            try:
                shown = [self._image(model, size) for size in sizes]
                encoded = collator.encode(samples, [one and one.text for one in shown])
            except (DataError, _LeftOut):
                return None
            by_model.append([_lengths(row, one.more if one else 0) for row, one in zip(encoded, shown, strict=True)])
        return [list(lengths) for lengths in zip(*by_model, strict=True)]

    def _tried(self, model: int, sample: Sample, size: tuple[int, int] | None) -> np.ndarray:
        shown = self._image(model, size)
        try:
            (row,) = self.collators[model].encode([sample], [shown and shown.text])
        except DataError as error:
            raise _LeftOut("no_sample", str(error)) from None
        return _lengths(row, shown.more if shown else 0)

    def _within(
        self, sample: Sample, size: tuple[int, int] | None, tried: list[np.ndarray]
    ) -> tuple[tuple[int, int, int], int]:
        """The verdict, and the tokens of the whole sample."""
        most, kept = self.settings.max_length, len(sample.turns)
        longest = tokens = max(int(lengths[-1]) for lengths in tried)
        if tokens > most and self.settings.too_long == "cut":
            kept = min(int((lengths[:-2] <= most).sum()) for lengths in tried)
            while kept and tokens > most:  # what a template writes after an answer may not fit
                shorter = replace(sample, turns=sample.turns[:kept])
                tried = [self._tried(model, shorter, size) for model in self._models]
                tokens = max(int(lengths[-1]) for lengths in tried)
                kept -= tokens > most
        if tokens > most:
            raise _LeftOut("too_long", f"{tokens:,} tokens; models.max_length is {most:,}")
        return (kept, tokens, max(int(lengths[-2]) for lengths in tried)), longest

    def _remark(self, split: Split, sample: Sample, kept: int, longest: int, size: tuple[int, int] | None) -> Remark | None:
        turns = len(sample.turns)
        if kept < turns:
            detail = f"{longest:,} tokens; the first {kept} of {turns} turns are within max_length {self.settings.max_length:,}"
            return Remark(split=split, id=sample.id, reason=CUT, detail=detail, turns=turns, kept=kept)
        if size and any(self._shown(model, size).stretched for model in self._models):
            detail = f"its image, {size[0]} x {size[1]} pixels, is stretched to a shape that the processor takes"
            return Remark(split=split, id=sample.id, reason=RESIZED, detail=detail, turns=turns, kept=kept)
        return None

    def _image(self, model: int, size: tuple[int, int] | None) -> _Shown | None:
        if size is None:
            return None
        try:
            shown = self._shown(model, size)
        except RefusedImageError as error:
            raise _LeftOut("refused_image", str(error)) from None
        if shown.stretched and self.settings.refused_images == "leave_out":
            raise _LeftOut("refused_image", f"a processor refuses an image of {size[0]} x {size[1]} pixels")
        return shown

    def _shown_anew(self, model: int, size: tuple[int, int]) -> _Shown:
        collator = self.collators[model]
        text, stretched = collator.shown(*size)
        ids = collator.tokenizer.encode(text, add_special_tokens=False)
        one = collator.tokenizer.convert_ids_to_tokens(visual_id(collator.processor))
        if {ids[0], ids[-1]} <= set(
            collator.tokenizer.added_tokens_decoder
        ):  # they part the words before and after, as one does
            return _Shown(one, len(ids) - 1, stretched)
        return _Shown(text, 0, stretched)


def _lengths(row: Encoded, more: int) -> np.ndarray:
    """Tokens up to the end of each answer, of all answers, and of all; `more` of them stand before the first answer."""
    follows = np.append(row.response[1:], False)
    ends = np.flatnonzero(row.response & ~follows) + 1 + more
    return np.array([*ends, row.response.sum(), len(row.input_ids) + more])


def different(folders: Sequence[Path]) -> list[Path]:
    """One folder of those whose files say that they read rows alike."""
    found: dict[str, Path] = {}
    for folder in folders:
        files = [path for pattern in ("*token*", "*processor*", "chat_template*") for path in folder.glob(pattern)]
        found.setdefault(sha256(sorted(set(files))), folder)
    return list(found.values())
