"""Greedy generation over a key/value cache, until the model ends its turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from components.config.evaluate import EvaluateSettings
from components.dataset.shards import CAPTION, Sample, Samples
from components.errors import DataError
from components.models.collate import Collator
from components.models.decoding import greedy
from components.models.families import prompt
from components.models.load import Loaded
from components.models.template import Template

if TYPE_CHECKING:
    from components.evaluate.journal import Journal


def questions(samples: Samples) -> list[int]:
    """Indices of the scored samples: all but captions, which are for training. Raises DataError if there are none."""
    rows = [row for row, kind in enumerate(samples.kinds) if kind != CAPTION]
    if not rows:
        raise DataError(f"none of the split's {len(samples):,} samples is a question to answer; see artifacts/dataset/card.md")
    return rows


def answers(
    loaded: Loaded,
    samples: Sequence[Sample],
    rows: Sequence[int],
    template: Template,
    max_length: int,
    settings: EvaluateSettings,
    title: str,
    journal: Journal | None = None,
) -> list[str]:
    """Greedy answers to the first question of each sample, in the order of `rows`.

    Batches hold samples of similar length, the longest first, so that a batch too large for the device fails at once; an answer
    does not depend on its batch. One batch of samples is in memory at a time.

    Args:
        samples: all samples.
        rows: indices of the samples to answer.
        template: chat template of the training.
        max_length: maximum prompt length, in tokens.
        settings: batch_size in samples; max_new_tokens, the maximum answer length.
        title: title of the progress bar.
        journal: batches complete in it are skipped, new ones are appended. Batches are those of an uninterrupted run, so
            the answers are too, even at near-ties.

    Raises:
        DataError: a prompt is longer than max_length.
    """
    collator = Collator(loaded.processor, template, max_length, train=False)
    answer_by_row: dict[int, str] = {}
    order = sorted(rows, key=lambda row: _length(samples[row]), reverse=True)
    with greedy(loaded, settings.max_new_tokens, collator.eos_id), tqdm(total=len(order), desc=title, unit="sample") as bar:
        for start in range(0, len(order), settings.batch_size):
            batch_rows = order[start : start + settings.batch_size]
            if journal is not None and all(str(row) in journal.answers for row in batch_rows):
                answer_by_row.update((row, journal.answers[str(row)]) for row in batch_rows)
                bar.update(len(batch_rows))
                continue
            batch = collator([samples[row] for row in batch_rows]).to(loaded.model.device)
            tokens = loaded.model.generate(**prompt(loaded.model, batch))
            new_tokens = tokens[:, batch.input_ids.shape[1] :]
            texts = loaded.processor.batch_decode(new_tokens, skip_special_tokens=True)
            batch_answers = dict(zip(batch_rows, (text.strip() for text in texts), strict=True))
            answer_by_row.update(batch_answers)
            if journal is not None:
                journal.add({str(row): text for row, text in batch_answers.items()})
            bar.update(len(batch_rows))
    return [answer_by_row[row] for row in rows]


def _length(sample: Sample) -> tuple[bool, int]:
    """Sort key of samples by prompt length: whether there is an image, then characters."""
    return sample.image is not None, len(sample.turns[0].question)
