"""Store of the teacher's evidence, and what it adds to a batch: counterfactual edits (align_ti/terms/mcd.py), or the image
dependence of response tokens (align_ti/terms/va_kd.py).

One file per kind of evidence and shard of the train split. Its tensors, for kinds `gradient` and `random`:

    samples                   (S, 4) int64     per sample: SAMPLE and PARTNER in the split, counts of its ROWS and PLACES
    effects                   (S,)             JS(teacher, without evidence) - JS(teacher, evidence alone), mean over rows
    places                    (P,) int32       positions of the evidence in the sample's sequence
    tokens                    (M, W)           top tokens with or without the evidence, at M response rows
    whole, without            (M, W + 1)       teacher probabilities of them plus the residual mass: unedited; without evidence

They hold only samples that the teacher answers correctly (greedy, under teacher forcing). For kinds `blurred` and `blank`:

    samples                   (S, 2) int64     per sample with an image: SAMPLE in the split, count of its response tokens
    effects                   (S,)             mean image dependence of the sample's tokens
    dependence                (M,)             image dependence of each response token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.align_ti.batch import Batch, Edits
from components.align_ti.ribbon import draw_key
from components.dataset.shards import Samples
from components.errors import DataError
from components.models.collate import Collator
from components.models.template import Template
from components.records.teacher_cache import EvidenceKept
from components.teacher_cache.store import open_shard

SAMPLE, PARTNER, ROWS, PLACES = range(4)  # columns of `samples`


def collator(processor: Any, template: Template, max_length: int) -> Collator:
    """Collator of samples to edit: `instruction` marks the question's words alone, not the template's."""
    return Collator(processor, template, max_length, train=True, rows="words")


def donor(batch: Batch, others: Batch) -> Batch:
    """Copy of the batch with the images of `others`, on equal visual grids, and their question words in place of its own,
    resampled to the nearest relative position."""
    ids = batch.input_ids.clone()
    for row in range(len(ids)):
        positions, donor_words = batch.instruction[row].nonzero()[:, 0], others.input_ids[row][others.instruction[row]]
        if len(positions) and len(donor_words):
            ids[row, positions] = donor_words[torch.linspace(0, len(donor_words) - 1, len(positions)).round().long()]
    return replace(batch, input_ids=ids, pixel_values=others.pixel_values, image_inputs=others.image_inputs)


def _read(folder: Path, manifest: EvidenceKept, kind: str) -> dict[str, np.ndarray]:
    """Tensors of a kind, over all its files; empty without any. Raises DataError if a file is missing or its hash differs."""
    shards = [open_shard(folder / name, digest) for name, digest in manifest.shards[kind].items()]
    return {name: torch.cat([shard[name] for shard in shards]).numpy() for name in (shards[0] if shards else ())}


def _spans(counts: np.ndarray) -> list[slice]:
    """Span of each sample in a tensor that has so many rows of each."""
    return [slice(end - count, end) for end, count in zip(counts.cumsum().tolist(), counts.tolist(), strict=True)]


class ImageDependence:
    """Reader of the image dependence of response tokens under one edit of the image, for L_va_kd. Raises as `_read`."""

    def __init__(self, folder: Path, manifest: EvidenceKept, kind: str) -> None:
        self._tensors = _read(folder, manifest, kind)
        samples, counts = self._tensors.get("samples", np.empty((0, 2), np.int64)).T
        self._span_of = dict(zip(samples.tolist(), _spans(counts), strict=True))

    def edit(self, batch: Batch, samples: Sequence[int], keys: Sequence[int]) -> Batch:
        """Copy of the batch of `samples` with the image dependence of their response tokens."""
        dependence = torch.zeros(batch.response.shape)
        for row, sample in enumerate(samples):
            if sample in self._span_of:
                values = self._tensors["dependence"][self._span_of[sample]]
                dependence[row, batch.response[row]] = torch.from_numpy(values)
        return replace(batch, dependence=dependence)


class Evidence:
    """Reader of one kind of evidence, for L_mcd.

    Args:
        verified: share of the samples to edit, rounded down to one or more, by largest positive effect; None: all.

    Raises DataError if a file is missing or its hash differs, or if no sample is left to edit.
    """

    def __init__(
        self, folder: Path, manifest: EvidenceKept, kind: str, verified: float | None, samples: Samples, collate: Collator
    ) -> None:
        self.samples, self.collate = samples, collate
        self._tensors = _read(folder, manifest, kind)
        self._rows = self._select_verified(verified) if self._tensors else {}
        if not manifest.asked:
            raise DataError(
                "L_mcd has nothing to edit: no sample has a partner, another image of as many visual tokens in its shard; raise"
                " images_per_shard in params/data.yaml, or give mcd no weight"
            )
        if not self._rows:
            raise DataError(
                f"L_mcd has nothing to edit: of {manifest.asked:,} samples the teacher answers {manifest.right[kind]:,} as the"
                " data do, and of these none is left whose evidence moves it; let one that has learnt teach"
            )

    def _select_verified(self, share: float | None) -> dict[int, int]:
        """Sample -> its row in the table."""
        table, effects = self._tensors["samples"], self._tensors["effects"]
        self._response_spans, self._place_spans = _spans(table[:, ROWS]), _spans(table[:, PLACES])
        # 0.29 of 100 are 29, though the product is below 29 in floats; of one sample a share is that sample
        count = len(effects) if share is None else max(1, int(share * len(effects) + 1e-9))
        by_effect = effects.argsort(kind="stable")[::-1][:count]
        verified = by_effect if share is None else by_effect[effects[by_effect] > 0]
        return {int(table[row, SAMPLE]): int(row) for row in verified}

    def __len__(self) -> int:
        """Number of samples with an edit, of the whole split."""
        return len(self._rows)

    def __contains__(self, sample: int) -> bool:
        return sample in self._rows

    def edit(self, batch: Batch, samples: Sequence[int], keys: Sequence[int]) -> Batch:
        """Copy of the batch of `samples` with edits of those that have evidence; `keys` seed the kind of edit."""
        indices = [index for index, sample in enumerate(samples) if sample in self._rows]
        entries = [self._rows[samples[index]] for index in indices]
        sample_indices = [samples[index] for index in indices] or [samples[0]]
        partners = self._tensors["samples"][entries, PARTNER].tolist() or sample_indices
        edited_batch = self.collate([self.samples[sample] for sample in sample_indices])
        if not indices:
            edited_batch = replace(edited_batch, response=torch.zeros_like(edited_batch.response))
        effect = torch.tensor([draw_key("mcd", keys[index]) % 2 == 0 for index in indices] or [False])
        evidence = torch.zeros(edited_batch.input_ids.shape)
        for row, entry in enumerate(entries):
            evidence[row, self._tensors["places"][self._place_spans[entry]]] = 1.0
        rows = [self._response_spans[entry] for entry in entries]
        edits = Edits(
            edited_batch,
            donor(edited_batch, self.collate([self.samples[sample] for sample in partners])),
            torch.where(effect[:, None], 1 - evidence, evidence) if indices else torch.ones_like(evidence),
            torch.tensor(indices, dtype=torch.long),
            effect,
            self._stacked("tokens", rows, torch.long),
            self._stacked("whole", rows),
            self._stacked("without", rows),
        )
        return replace(batch, edits=edits)

    def _stacked(self, name: str, rows: list[slice], dtype: torch.dtype = torch.float32) -> Tensor:
        """Response rows of all edited samples, from one tensor of the files."""
        values = self._tensors[name]
        return torch.from_numpy(np.concatenate([values[:0], *(values[span] for span in rows)])).to(dtype)
