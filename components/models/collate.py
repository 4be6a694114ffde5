"""Samples -> one batch of tensors: prompt template, tokenizer, image processor, and the masks that every loss stands on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from components.errors import DataError, ModelError
from components.models.template import IMAGE, Template
from components.shards import Sample

if TYPE_CHECKING:
    from PIL import Image

PIXEL_CACHE_BYTES = 2**29  # the image processor costs 0.3 ms an image, as much as a small student's whole step


@dataclass(frozen=True)
class Batch:
    """B samples of at most T tokens; images in the order of the samples that have one."""

    ids: list[str]
    image_ids: list[str]  # of `pixel_values`
    input_ids: Tensor  # (B, T) long
    attention_mask: Tensor  # (B, T) long, 0 at padding
    response: Tensor  # (B, T) bool: answers, the EOS of each included
    instruction: Tensor  # (B, T) bool: text after the image that is not response
    visual: Tensor  # (B, T) bool: the image's tokens
    pixel_values: Tensor | None  # (images, 3, H, W) float32; None if no sample has an image

    def to(self, device: torch.device | str) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Encoded:
    """One sample as rows of length T_i."""

    input_ids: np.ndarray  # long
    response: np.ndarray  # bool
    instruction: np.ndarray  # bool
    visual: np.ndarray  # bool


class Collator:
    """Turn samples into a Batch.

    `train`: all turns with their answers, padded right. Else: the first turn without its answer, padded left, so that
    `generate` goes on from the last column.

    Raises:
        ModelError: at construction, if the processor cannot serve (see `visual_tokens`, `check_special_tokens`).
        DataError: naming the sample: longer than `max_length` tokens, `<image>` that does not match its image, text that
            contains a special token, no response token, an image that does not decode.
    """

    def __init__(self, processor: Any, template: Template, max_length: int, train: bool) -> None:
        check_special_tokens(processor)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.template = replace(template, eos=self.tokenizer.eos_token)
        self.max_length = max_length
        self.train = train
        self._image_text = processor.image_token * visual_tokens(processor)
        self._reserved = tuple(self.tokenizer.all_special_tokens)
        self._pixels: dict[str, Tensor] = {}
        self._pixel_bytes = 0

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        batch = self.text(samples)
        return replace(batch, pixel_values=self.pixels(samples))

    def text(self, samples: Sequence[Sample]) -> Batch:
        """The batch without its pixels, for callers that hold the images' features already."""
        rows = self.encode(samples)
        length = max(len(row.input_ids) for row in rows)

        def stack(name: str, fill: int) -> Tensor:
            table = np.full((len(rows), length), fill, dtype=getattr(rows[0], name).dtype)
            for line, row in zip(table, rows, strict=True):
                values = getattr(row, name)
                line[slice(len(values)) if self.train else slice(length - len(values), None)] = values
            return torch.from_numpy(table)

        lengths = torch.tensor([len(row.input_ids) for row in rows])[:, None]
        column = torch.arange(length)[None, :]
        return Batch(
            ids=[sample.id for sample in samples],
            image_ids=[sample.image_id for sample in samples if sample.image is not None],
            input_ids=stack("input_ids", self.tokenizer.pad_token_id),
            attention_mask=(column < lengths if self.train else column >= length - lengths).long(),
            response=stack("response", False),
            instruction=stack("instruction", False),
            visual=stack("visual", False),
            pixel_values=None,
        )

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Token ids and masks. A token is response if its characters overlap a response's, whatever the tokenizer's kind."""
        for sample in samples:
            self._check(sample)
        rendered = [
            self.template.render(sample.turns, self._image_text if sample.image is not None else None, self.train)
            for sample in samples
        ]
        tokens = self.tokenizer([r.text for r in rendered], return_offsets_mapping=True)
        rows = []
        for sample, text, ids, offsets in zip(samples, rendered, tokens["input_ids"], tokens["offset_mapping"], strict=True):
            start, end = np.asarray(offsets).T
            input_ids = np.asarray(ids)
            response = np.zeros(len(ids), dtype=bool)
            for a, b in text.response_spans:
                answer = (start < b) & (end > a)
                if answer.sum() < 2:  # its EOS, and nothing else
                    raise DataError(f"sample {sample.id}: an answer has no response tokens: {text.text[a:b]!r}")
                response |= answer
            visual = input_ids == self.processor.image_token_id
            after = np.cumsum(visual) == visual.sum() if visual.any() else np.zeros_like(visual)
            rows.append(Encoded(input_ids, response, after & ~visual & ~response & (end > start), visual))
            self._check_encoded(sample, rows[-1])
        return rows

    def pixels(self, samples: Sequence[Sample]) -> Tensor | None:
        """(images, 3, H, W) float32 of the samples that have an image, in their order; None if none has."""
        wanted = {sample.image_id: sample for sample in samples if sample.image is not None}
        fresh = [sample for key, sample in wanted.items() if key not in self._pixels]
        found = {key: self._pixels[key] for key in wanted if key in self._pixels}
        if fresh:
            images = [decode(sample) for sample in fresh]
            processed = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            for sample, pixels in zip(fresh, processed, strict=True):
                found[sample.image_id] = pixels
                if self._pixel_bytes + pixels.nbytes <= PIXEL_CACHE_BYTES:
                    self._pixels[sample.image_id] = pixels
                    self._pixel_bytes += pixels.nbytes
        return torch.stack([found[sample.image_id] for sample in samples if sample.image is not None]) if found else None

    def _check(self, sample: Sample) -> None:
        if not sample.turns:
            raise DataError(f"sample {sample.id}: no turns")
        marks = [text.count(IMAGE) for turn in sample.turns for text in (turn.question, turn.answer)]
        wanted = [int(sample.image is not None)] + [0] * (len(marks) - 1)
        if marks != wanted:
            raise DataError(
                f"sample {sample.id}: {IMAGE} stands {sum(marks)} time(s) in its text; "
                + ("it must stand once, in the first question" if sample.image is not None else "but the sample has no image")
            )
        if self.train and not all(turn.answer.strip() for turn in sample.turns):
            raise DataError(f"sample {sample.id}: an answer is empty, so there are no response tokens")
        for turn in sample.turns:
            for text in (turn.question.replace(IMAGE, ""), turn.answer):
                reserved = [token for token in self._reserved if token in text]
                if reserved:
                    raise DataError(f"sample {sample.id}: the special token {reserved[0]!r} stands in its text; escape it")

    def _check_encoded(self, sample: Sample, row: Encoded) -> None:
        if len(row.input_ids) > self.max_length:
            raise DataError(
                f"sample {sample.id}: {len(row.input_ids)} tokens, {int(row.visual.sum())} of them visual; "
                f"params/models.yaml:max_length is {self.max_length}"
            )


def decode(sample: Sample) -> Image.Image:
    """The sample's image, RGB. Raises DataError naming the sample if it does not decode."""
    from PIL import Image, UnidentifiedImageError

    assert sample.image is not None
    try:
        return Image.open(io.BytesIO(sample.image)).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"sample {sample.id}: image {sample.image_id} does not decode: {error}") from None


def check_special_tokens(processor: Any) -> None:
    """Raises ModelError if the tokenizer has no offsets, no EOS, no pad of its own, or does not know the image token."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ModelError(f"{type(processor).__name__} is not a processor of images and text; is this a language-only model?")
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: {type(tokenizer).__name__} has no character offsets; save a fast tokenizer (tokenizer.json)")
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise ModelError(
            f"{name}: the tokenizer has no {'EOS' if tokenizer.eos_token_id is None else 'padding'} token; set one"
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelError(
            f"{name}: padding and EOS are the same token, {tokenizer.eos_token!r}: a model trained so never learns to stop; "
            "give the tokenizer a pad_token of its own"
        )
    image_token = getattr(processor, "image_token", None)
    known = tokenizer.encode(image_token, add_special_tokens=False) if image_token else []
    if len(known) != 1 or known[0] == tokenizer.unk_token_id or known[0] != processor.image_token_id:
        raise ModelError(f"{name}: the image token {image_token!r} is missing from the tokenizer; add it as a special token")


def visual_tokens(processor: Any) -> int:
    """Nv: visual tokens per image, asked of the processor itself.

    Raises ModelError if the processor cannot say or if the count varies with the image's shape: teacher and student are
    aligned token by token.
    """
    from PIL import Image

    if getattr(processor, "patch_size", None) is None or not hasattr(processor, "replace_image_token"):
        raise ModelError(f"{type(processor).__name__} is not LLaVA-like, or its processor_config.json lacks patch_size")
    counts = set()
    for shape in ((64, 64), (96, 48)):
        images = processor.image_processor(images=[Image.new("RGB", shape)], return_tensors="np")
        counts.add(processor.replace_image_token(images, 0).count(processor.image_token))
    if len(counts) > 1:
        raise ModelError(f"{type(processor).__name__}: the number of visual tokens varies with the image's shape: {counts}")
    return counts.pop()
