"""Collator: samples -> one batch of tensors (template, tokenizer, image processor, masks of the losses)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from components.align_ti.batch import Batch
from components.dataset.shards import Sample, Turn
from components.errors import DataError, ModelError
from components.models.image_processor import (
    Processed,
    RefusedImageError,
    decode_images,
    image_text,
    outgrows,
    pad_and_concatenate,
    processed,
    stretched,
    visual_id,
)
from components.models.plain import PlainText
from components.models.rendered import Rendered
from components.models.template import IMAGE, Template
from components.records.irs import Rows

if TYPE_CHECKING:
    from PIL import Image

AnswerIds = Sequence[Sequence[Sequence[int]] | None]  # per sample, token ids of the answers to its first questions
PLACEHOLDER_ANSWER = "This"  # for an answer that token ids replace; templates are tried with it
PIXEL_CACHE_BYTES = 2**29  # processing costs 0.3 ms an image, as much as a small student's whole step


@dataclass(frozen=True)
class Encoded:
    """Token ids and masks of one sample, each of length T_i."""

    input_ids: np.ndarray  # long
    response: np.ndarray  # bool
    instruction: np.ndarray  # bool
    pictures: np.ndarray  # long

    @property
    def visual(self) -> np.ndarray:
        return self.pictures > 0

    def with_answers(self, answers: Sequence[Sequence[int]]) -> Encoded:
        """This row with `answers` as its first responses, up to the response after them, if there is one."""
        edges = np.flatnonzero(np.diff(self.response, prepend=False, append=False))  # a response's start, its end, ...
        starts, ends = edges[::2].tolist(), [0, *edges[1::2].tolist()]
        parts = []
        for ids, start, end in zip(answers, starts, ends, strict=False):
            parts += [self._slice(end, start), _encoded_answer(ids)]
        if len(starts) > len(answers):
            parts.append(self._slice(ends[len(answers)], starts[len(answers)]))
        return Encoded(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(self)))

    def _slice(self, start: int, end: int) -> Encoded:
        return Encoded(*(getattr(self, f.name)[start:end] for f in fields(self)))


def _encoded_answer(ids: Sequence[int]) -> Encoded:
    return Encoded(np.asarray(ids), np.ones(len(ids), bool), np.zeros(len(ids), bool), np.zeros(len(ids), int))


class Collator:
    """Collate samples into a Batch.

    `train`: all turns with their answers, padded right. Else: the prompt of the first turn, padded left, so that `generate`
    continues at the last column. `rows`: the instruction tokens, whose attention maps are read: all text after the
    first image but the responses, or the words of the questions without the template's.

    Raises:
        ModelError: at construction, if the processor is unusable (see `check_special_tokens`).
        ModelError: the template of a sample has no place for several images.
        DataError: naming the sample: longer than `max_length` tokens, `<image>` that do not match its images, no response
            token, an image that does not decode. The stage `check_rows` leaves those rows out beforehand.
    """

    def __init__(
        self, processor: Any, template: Template, max_length: int, train: bool, teacher: Any = None, rows: Rows = "all"
    ) -> None:
        """`teacher`: the teacher's processor, if it differs from this one."""
        check_special_tokens(processor)
        self._teacher = None if teacher is None else Collator(teacher, template, sys.maxsize, train, rows=rows)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.template = template.of(processor)
        self.eos_id: int = self.tokenizer.convert_tokens_to_ids(self.template.eos)  # ends every answer
        self._visual_id = visual_id(processor)
        self.max_length = max_length
        self.train = train
        self.rows = rows
        self._image_text = image_text(processor)  # None: depends on the image
        self._plain = PlainText(self.tokenizer)
        self._processed: dict[tuple[str, int], Processed] = {}
        self._processed_bytes = 0

    def __call__(self, samples: Sequence[Sample], answers: AnswerIds | None = None) -> Batch:
        """`answers`: per sample, token ids of the answers to its first questions. `train`: its turns are those, with these
        answers; else the prompt is of the turn after them. None: the turns and answers of the data, or the first prompt."""
        samples = self._select_turns(samples, answers)
        batch = self.text(samples, answers)
        if self._teacher is not None:
            batch = replace(batch, teacher=_check_same_text(self._teacher(samples, answers), batch))
        images = [image.tensors for image in self.images(samples)]
        if not images:
            return batch
        tensors = {name: pad_and_concatenate([image[name] for image in images]) for name in images[0]}
        return replace(batch, pixel_values=tensors.pop("pixel_values"), image_inputs=tensors)

    @property
    def of_prompts(self) -> Collator:
        """Collator of prompts (`train` off), of any length, that shares this one's image cache."""
        collator = copy(self)
        collator.train, collator._teacher, collator.max_length = False, None, sys.maxsize
        return collator

    def text(self, samples: Sequence[Sample], answers: AnswerIds | None = None) -> Batch:
        """Batch without pixels, for callers that have the visual features."""
        samples = self._select_turns(samples, answers)
        rows = self.encode(samples, answers=answers)
        side = "right" if self.train else "left"

        def padded(arrays: Iterable[np.ndarray], fill: int = 0) -> Tensor:
            return pad_sequence([torch.from_numpy(array) for array in arrays], True, fill, side)

        return Batch(
            ids=[sample.id for sample in samples],
            image_ids=[sample.image_id for sample in samples for _ in sample.images],
            input_ids=padded((row.input_ids for row in rows), self.tokenizer.pad_token_id),
            attention_mask=padded(np.ones_like(row.input_ids) for row in rows),
            response=padded(row.response for row in rows),
            instruction=padded(row.instruction for row in rows),
            pictures=padded(row.pictures for row in rows),
            pixel_values=None,
        )

    def _select_turns(self, samples: Sequence[Sample], answers: AnswerIds | None) -> Sequence[Sample]:
        if answers is None:
            return samples if self.train else [sample.upto(1) for sample in samples]
        turn_counts = [None if sample_answers is None else len(sample_answers) + (not self.train) for sample_answers in answers]
        return [sample if count is None else sample.upto(count) for sample, count in zip(samples, turn_counts, strict=True)]

    def encode(
        self, samples: Sequence[Sample], image_texts: Sequence[Sequence[str]] | None = None, answers: AnswerIds | None = None
    ) -> list[Encoded]:
        """Token ids and masks of each sample. A token is response if its character offsets overlap a response.

        `image_texts`: placeholder texts of each sample's images, if known already. `answers`: as in `__call__`.
        """
        for sample in samples:
            self._check(sample)
        image_texts = [self.image_texts(sample) for sample in samples] if image_texts is None else image_texts
        answers = answers or [None] * len(samples)
        rendered = [
            self.template.render(
                sample.turns if sample_answers is None else _placeholder_turns(sample),
                texts,
                self.train or bool(sample_answers),
            )
            for sample, texts, sample_answers in zip(samples, image_texts, answers, strict=True)
        ]
        rows = []
        for sample, sample_answers, tokenized in zip(samples, answers, self._tokenize(rendered), strict=True):
            row = self._masked(sample, *tokenized)
            rows.append(row.with_answers(sample_answers) if sample_answers else row)
            self._check_encoded(sample, rows[-1])
        return rows

    def _masked(self, sample: Sample, rendering: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
        start, end = np.asarray(offsets).T
        input_ids = np.asarray(ids)
        response = np.zeros(len(ids), dtype=bool)
        for a, b in rendering.response_spans:
            tokens = (start < b) & (end > a)
            if tokens.sum() < 2:  # EOS alone
                raise DataError(f"sample {sample.id}: an answer has no response tokens: {rendering.text[a:b]!r}")
            response |= tokens
        visual = input_ids == self._visual_id
        pictures = np.zeros_like(input_ids)
        instruction = np.zeros_like(response)
        for number, (a, b) in enumerate(rendering.image_spans, start=1):
            image_tokens = np.flatnonzero(visual & (start < b) & (end > a))
            pictures[image_tokens] = number
            instruction[image_tokens[0] : image_tokens[-1]] = False  # text between tiles
            instruction[image_tokens[-1] :] = True
        instruction &= ~visual & ~response & (end > start)
        if self.rows == "words":
            instruction &= np.any([(start < b) & (end > a) for a, b in rendering.question_spans], axis=0)
        return Encoded(input_ids, response, instruction, pictures)

    def _tokenize(self, rendered: list[Rendered]) -> Iterator[tuple[Rendered, list[int], list[tuple[int, int]]]]:
        """Each text, its token ids and character offsets. Only the template writes special tokens; the spelling of one in a
        sample's text is plain text."""
        add_special_tokens = self.template.wants_special_tokens
        tokens = self.tokenizer([r.text for r in rendered], return_offsets_mapping=True, add_special_tokens=add_special_tokens)
        for text, ids, offsets in zip(rendered, tokens["input_ids"], tokens["offset_mapping"], strict=True):
            yield self._plain.encode(text, add_special_tokens) if self._plain.is_needed(text) else (text, ids, offsets)

    def decoded_text(self, sample: Sample) -> str:
        """Decoded input and response tokens of a sample, for the log.

        Raises ModelError if the response mask does not have one EOS per turn.
        """
        (row,) = self.encode([sample])
        ends = int((row.input_ids[row.response] == self.eos_id).sum())
        if ends != len(sample.turns):
            raise ModelError(
                f"sample {sample.id}: {len(sample.turns)} answer(s), and {ends} times {self.template.eos!r} in what is trained"
                " on: the template and the tokenizer do not go together"
            )
        inputs = self.tokenizer.decode(row.input_ids[~row.visual])
        outputs = self.tokenizer.decode(row.input_ids[row.response])
        return f"sample {sample.id} reads {inputs!r} around {int(row.visual.sum())} visual tokens; trained on: {outputs!r}"

    def images(self, samples: Sequence[Sample]) -> list[Processed]:
        """Processed images of the samples that have any, in order; cached up to PIXEL_CACHE_BYTES."""
        with_images = [sample for sample in samples if sample.image is not None]
        keys = [(sample.image_id, len(sample.images)) for sample in with_images]
        images: dict[tuple[str, int], Processed] = {}
        for key, sample in zip(keys, with_images, strict=True):
            image = images.get(key) or self._processed.get(key) or self._accepted(decode_images(sample))[0]
            images[key] = image
            if key not in self._processed and self._processed_bytes + image.nbytes <= PIXEL_CACHE_BYTES:
                self._processed[key] = image
                self._processed_bytes += image.nbytes
        return [images[key] for key in keys]

    def _accepted(self, images: list[Image.Image]) -> tuple[Processed, bool]:
        """Processed images, stretched if the processor refuses their shapes, and whether they were."""
        try:
            return processed(self.processor, *images), False
        except RefusedImageError:
            return processed(self.processor, *map(stretched, images)), True

    def shown(self, sizes: Sequence[tuple[int, int]]) -> tuple[tuple[str, ...], bool]:
        """Placeholder texts of images of these sizes, and whether one has to be stretched.

        Raises RefusedImageError if the processor refuses the stretched images, too.
        """
        from PIL import Image

        if self._image_text is not None and not any(outgrows(self.processor, size) for size in sizes):
            return (self._image_text,) * len(sizes), False
        if not sizes:
            return (), False
        made, changed = self._accepted([Image.new("RGB", size) for size in sizes])
        return made.texts, changed

    def image_texts(self, sample: Sample) -> tuple[str, ...]:
        """Placeholder text of each image of the sample."""
        if sample.image is None or self._image_text is not None:
            return (self._image_text or "",) * len(sample.images)
        return self.images([sample])[0].texts

    def _check(self, sample: Sample) -> None:
        if not sample.turns:
            raise DataError(f"sample {sample.id}: no turns")
        in_questions = sum(turn.question.count(IMAGE) for turn in sample.turns)
        in_answers = sum(turn.answer.count(IMAGE) for turn in sample.turns)
        if (in_questions, in_answers) != (len(sample.images), 0):
            raise DataError(
                f"sample {sample.id}: {IMAGE} stands {in_questions} time(s) in its questions and {in_answers} in its answers;"
                f" it must stand {len(sample.images)} time(s) in questions, once for each image"
            )
        if self.train and not all(turn.answer.strip() for turn in sample.turns):
            raise DataError(f"sample {sample.id}: an answer is empty, so there are no response tokens")

    def _check_encoded(self, sample: Sample, row: Encoded) -> None:
        if len(row.input_ids) > self.max_length:
            raise DataError(
                f"sample {sample.id}: {len(row.input_ids)} tokens, {int(row.visual.sum())} of them visual; "
                f"params/models.yaml:max_length is {self.max_length}"
            )


def _placeholder_turns(sample: Sample) -> list[Turn]:
    return [replace(turn, answer=PLACEHOLDER_ANSWER) for turn in sample.turns]


def check_special_tokens(processor: Any) -> None:
    """Raises ModelError for a text-only processor, or a tokenizer without offsets, EOS, its own pad, or the image token."""
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
    image_ids = tokenizer.encode(image_token, add_special_tokens=False) if image_token else []
    if len(image_ids) != 1 or image_ids[0] == tokenizer.unk_token_id or image_ids[0] != processor.image_token_id:
        raise ModelError(f"{name}: the image token {image_token!r} is missing from the tokenizer; add it as a special token")


def _check_same_text(teacher: Batch, student: Batch) -> Batch:
    """The teacher's batch. Raises ModelError if the two batches differ in text tokens."""
    for row, name in enumerate(student.ids):
        teacher_ids, student_ids = (b.input_ids[row][b.attention_mask[row].bool() & ~b.visual[row]] for b in (teacher, student))
        if not torch.equal(teacher_ids, student_ids):
            raise ModelError(
                f"sample {name}: beside the visual tokens, teacher and student read different tokens, so rows of one have no"
                " counterpart in the other (what stands between the tiles of an image?)"
            )
    return teacher
