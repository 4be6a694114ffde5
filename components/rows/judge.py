"""One row, tried as every model of a recipe would read it: does it make a training sample of at most `max_length` tokens?

Texts and the headers of images alone are looked at, with the very tokenizers, templates and image-size rules that read them in
training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from components.artifacts import Record, Split, sha256
from components.errors import DataError
from components.models.collate import Collator, Encoded, RefusedImageError
from components.models.processor import load_processor
from components.models.template import Template
from components.settings import ModelsSettings
from components.shards import Sample

VERDICT = np.dtype([("turns", "<u2"), ("tokens", "<i4"), ("response", "<i4")])  # turns kept: 0 if the sample is left out
SIZES = 2**14  # of images, whose visual tokens are remembered
CUT, RESIZED = "cut", "resized"  # of usable samples; other reasons are of those that are left out


class Remark(Record):
    """One line of remarks.jsonl: a sample that is left out, or changed, and why."""

    split: Split
    id: str
    reason: str  # too_long, refused_image or no_sample; or CUT or RESIZED
    detail: str
    turns: int  # that it had
    kept: int


class _LeftOut(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class Judge:
    def __init__(self, folders: Sequence[Path], settings: ModelsSettings) -> None:
        """`folders`: of models that read rows each in its own way (`different`)."""
        self.settings = settings
        template = Template.asked(settings.template)
        self.collators = [Collator(load_processor(folder), template, sys.maxsize, train=True) for folder in folders]
        self._shown = lru_cache(SIZES)(lambda place, size: self.collators[place].shown(*size))

    def __call__(
        self, split: Split, samples: Sequence[Sample], sizes: Sequence[tuple[int, int] | None]
    ) -> Iterator[tuple[tuple[int, int, int], Remark | None]]:
        """Of each sample, whose image has that size, its verdict and what there is to say of it."""
        together = self._together(samples, sizes)
        for place, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
            turns = len(sample.turns)
            try:
                shown = [self._text(model, size) for model in range(len(self.collators))]
                rows = together[place] if together else self._encoded(sample, shown)
                longest = max(len(row.input_ids) for row in rows)
                kept, rows = self._within(sample, shown, rows)
            except _LeftOut as left:
                remark = Remark(split=split, id=sample.id, reason=left.reason, detail=left.detail, turns=turns, kept=0)
                yield (0, 0, 0), remark
                continue
            tokens, response = max(len(row.input_ids) for row in rows), max(int(row.response.sum()) for row in rows)
            yield (kept, tokens, response), self._remark(split, sample, kept, longest, size)

    def _remark(self, split: Split, sample: Sample, kept: int, longest: int, size: tuple[int, int] | None) -> Remark | None:
        turns = len(sample.turns)
        if kept < turns:
            detail = f"{longest:,} tokens; the first {kept} of {turns} turns are within max_length {self.settings.max_length:,}"
            return Remark(split=split, id=sample.id, reason=CUT, detail=detail, turns=turns, kept=kept)
        if size and any(self._shown(model, size)[1] for model in range(len(self.collators))):
            detail = f"its image, {size[0]} x {size[1]} pixels, is stretched to a shape that the processor takes"
            return Remark(split=split, id=sample.id, reason=RESIZED, detail=detail, turns=turns, kept=kept)
        return None

    def _text(self, model: int, size: tuple[int, int] | None) -> str | None:
        if size is None:
            return None
        try:
            text, stretched = self._shown(model, size)
        except RefusedImageError as error:
            raise _LeftOut("refused_image", str(error)) from None
        if stretched and self.settings.refused_images == "leave_out":
            raise _LeftOut("refused_image", f"a processor refuses an image of {size[0]} x {size[1]} pixels")
        return str(text)

    def _together(self, samples: Sequence[Sample], sizes: Sequence[tuple[int, int] | None]) -> list[list[Encoded]] | None:
        """All samples encoded at once by each model, which is fastest; None if something is wrong with one of them."""
        try:
            by_model = [
                collator.encode(samples, [self._text(model, size) for size in sizes])
                for model, collator in enumerate(self.collators)
            ]
        except (DataError, _LeftOut):
            return None
        return [list(rows) for rows in zip(*by_model, strict=True)]

    def _encoded(self, sample: Sample, shown: Sequence[str | None]) -> list[Encoded]:
        try:
            return [collator.encode([sample], [text])[0] for collator, text in zip(self.collators, shown, strict=True)]
        except DataError as error:
            raise _LeftOut("no_sample", str(error)) from None

    def _within(self, sample: Sample, shown: Sequence[str | None], rows: list[Encoded]) -> tuple[int, list[Encoded]]:
        """How many of its turns are kept, and the sample so cut."""
        most, kept = self.settings.max_length, len(sample.turns)
        tokens = max(len(row.input_ids) for row in rows)
        if tokens > most and self.settings.too_long == "cut":
            kept = min(int((_ends(row) <= most).sum()) for row in rows)
            while kept and tokens > most:  # what a template writes after an answer may not fit
                rows = self._encoded(replace(sample, turns=sample.turns[:kept]), shown)
                tokens = max(len(row.input_ids) for row in rows)
                kept -= tokens > most
        if tokens > most:
            visual = max(int(row.visual.sum()) for row in rows)
            raise _LeftOut("too_long", f"{tokens:,} tokens, {visual:,} of them visual; models.max_length is {most:,}")
        return kept, rows


def _ends(row: Encoded) -> np.ndarray:
    """Tokens up to the end of each answer."""
    follows = np.append(row.response[1:], False)
    return np.flatnonzero(row.response & ~follows) + 1


def different(folders: Sequence[Path]) -> list[Path]:
    """One folder of those whose files say that they read rows alike."""
    found: dict[str, Path] = {}
    for folder in folders:
        files = [path for pattern in ("*token*", "*processor*", "chat_template*") for path in folder.glob(pattern)]
        found.setdefault(sha256(sorted(set(files))), folder)
    return list(found.values())
