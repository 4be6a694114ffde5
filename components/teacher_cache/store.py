"""Store of cached teacher distributions: memory-mapped safetensors, and a manifest that identifies teacher, data and settings.

One shard per shard of the train split. Its tensors:

    tokens, log_probs, log_tail   (M, k), (M, k), (M,)   top-k of the teacher at M rows (align_ti/top_k.py); or
    tokens, counts, starts, entropy   (E,), (E,), (M + 1,), (M,)   draws from the teacher, row m at starts[m]:starts[m + 1]
                                                         (align_ti/sampled.py)
    attention                     (A,)                   weights of each sample's visual tokens, sum 1 per image
    samples                       (S, 6) int64           per sample: KEY, offsets and counts of its rows, offset in `attention`

Visual rows depend on the image and its prefix alone, so samples about one image share them, but PaliGemma's, which depend on
the question, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from components.align_ti.batch import Batch, predicting
from components.align_ti.cached import Cached, Rows
from components.align_ti.sampled import Sampled
from components.align_ti.top_k import TopK
from components.config.settings import Settings
from components.errors import DataError
from components.io import sha256
from components.irs.weighting import weighting
from components.models.template import Template
from components.records.dataset import Manifest
from components.records.irs import LayerChoice
from components.records.models import ModelIndex
from components.records.paths import DATASET, MODELS, ROWS, TEACHER
from components.records.teacher import TeacherChoice
from components.records.teacher_cache import EvidenceKept, SignalCache, SignalFacts, SignalManifest

KEY, TEXT, TEXT_ROWS, VISUAL, VISUAL_ROWS, ATTENTION = range(6)  # columns of `samples`
Span = tuple[dict[str, Tensor], int, int]  # rows first:last of a shard
ManifestT = TypeVar("ManifestT", SignalCache, EvidenceKept)
AGAIN = "`dvc repro cache_teacher` makes it anew"


def facts(settings: Settings) -> SignalFacts:
    """Identity of a cache: the settings and outputs of earlier stages that determine its bytes."""
    distill = settings.distill
    weights = weighting(distill.iva, LayerChoice.read_if_searched())
    students, evidence = ModelIndex.read(MODELS / "index.json").students, distill.teacher_signals.evidence
    return SignalFacts(
        teacher=TeacherChoice.read(TEACHER / "choice.json").sha256,
        students={name: student.sha256 for name, student in sorted(students.items())},
        dataset=Manifest.read(DATASET / "manifest.json").digest,
        split=sha256([ROWS / "train.npy"]),
        template=hashlib.sha256(Template.from_settings(settings.models.template).identity.encode()).hexdigest(),
        precision=distill.precision,
        layer=weights.layer,
        rows=weights.rows,
        background=weights.digest,
        temperature=distill.divergence.temperature,
        kind=distill.teacher_signals.kind,
        top_k=distill.teacher_signals.top_k,
        draws=distill.teacher_signals.draws,
        evidence=None if evidence is None else evidence.model_dump(),
    )


def keys(batch: Batch) -> list[int]:
    """64-bit hashes of each sample's id and tokens; they change with text, template or tokenizer."""
    rows = zip(batch.ids, batch.input_ids.to("cpu", torch.int64), batch.attention_mask.sum(1).tolist(), strict=True)
    contents = [id_.encode() + b"\0" + tokens[:length].numpy().tobytes() for id_, tokens, length in rows]
    return [int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True) for content in contents]


class Signals:
    """Reader of a teacher cache: rows by sample, from memory-mapped files."""

    def __init__(self, folder: Path, shards: dict[str, str]) -> None:
        """Open the shards of `folder`; `shards` maps file names to sha256.

        Raises DataError if one is missing or its hash differs, or if two samples have the same key.
        """
        self._shards = [open_shard(folder / name, digest) for name, digest in shards.items()]
        tables = [shard["samples"].numpy() for shard in self._shards]
        self._samples = np.concatenate(tables)
        self._shard_of = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        self._attention_source = np.arange(len(self._samples))  # source sample of each sample's attention
        self._order = self._samples[:, KEY].argsort()
        self._sorted = self._samples[self._order, KEY]
        if (self._sorted[1:] == self._sorted[:-1]).any():
            raise DataError(f"{folder}: two samples have the same id and the same text; give each an id of its own")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    @property
    def rows(self) -> int:
        return sum(len(shard["entropy" if "entropy" in shard else "log_tail"]) for shard in self._shards)

    @property
    def equal_weights(self) -> int:
        """Number of samples whose visual tokens, two or more, all have the same weight."""
        count = 0
        for shard in self._shards:
            table = shard["samples"].numpy()
            table = table[table[:, VISUAL_ROWS] > 0]  # of one token too: a segment ends where the next begins
            if len(table):
                weights, firsts = shard["attention"].numpy(), table[:, ATTENTION]
                equal = np.maximum.reduceat(weights, firsts) == np.minimum.reduceat(weights, firsts)
                count += int((equal & (table[:, VISUAL_ROWS] > 1)).sum())
        return count

    def substitute_attention(self, control: str, rows: Sequence[int]) -> None:
        """Control: replace each sample's attention by another sample's, `other_instruction` by the next on the same images,
        `other_image` by one on the next images with as many visual tokens. A sample without a counterpart keeps its own.

        Args:
            rows: image row in the data set of each cached sample, in order.
        """
        by_image: dict[tuple[int, int], list[int]] = {}
        for sample, (row, size) in enumerate(zip(rows, self._samples[:, VISUAL_ROWS].tolist(), strict=True)):
            if size:
                by_image.setdefault((row, size), []).append(sample)
        rings: dict[int, list[list[int]]] = {}
        for (_, size), samples in by_image.items():
            rings.setdefault(size, []).append(samples)
        for ring in rings.values():
            for members, next_image in zip(ring, [*ring[1:], ring[0]], strict=True):
                sources = [*members[1:], members[0]] if control == "other_instruction" else next_image
                self._attention_source[members] = [sources[position % len(sources)] for position in range(len(members))]

    def look_up(self, batch: Batch, visual: bool, with_attention: bool) -> tuple[Cached, Tensor | None]:
        """Cached distributions at the rows that predict a response, with `visual` at the visual rows too; `with_attention`: the
        attention (B, Nv) that weights visual tokens. On the batch's device.

        Raises DataError naming the first sample that the cache does not hold with these tokens.
        """
        table_rows = self._find(batch)
        spans = self._spans(table_rows, TEXT, TEXT_ROWS)
        if visual:
            spans += self._spans(table_rows, VISUAL, VISUAL_ROWS)
        device = batch.input_ids.device
        rows = _load_rows(spans, device)
        index = torch.full(batch.input_ids.shape, -1, device=device)
        row_numbers = torch.arange(len(rows), device=device)
        text_count = int(self._samples[table_rows, TEXT_ROWS].sum())
        index[predicting(batch.response)] = row_numbers[:text_count]
        if visual:
            index[batch.visual] = row_numbers[text_count:]
        cached = Cached(rows, index)
        if not with_attention:
            return cached, None
        attention_spans = self._spans(self._attention_source[table_rows], ATTENTION, VISUAL_ROWS)
        weights = [shard["attention"][first:last] for shard, first, last in attention_spans]
        return cached, pad_sequence(weights, batch_first=True).to(device)

    def _spans(self, samples: np.ndarray, offset: int, count: int) -> list[Span]:
        """Rows of each sample in its shard, by two columns of the table."""
        first, rows = self._samples[samples][:, [offset, count]].T
        shards = (self._shards[i] for i in self._shard_of[samples])
        return list(zip(shards, first, first + rows, strict=True))

    def _find(self, batch: Batch) -> np.ndarray:
        """(B,) row of each sample in the table. Raises DataError on a cache miss."""
        expected = np.array(keys(batch))
        positions = self._sorted.searchsorted(expected).clip(max=len(self._sorted) - 1)
        missing = self._sorted[positions] != expected
        if missing.any():
            raise DataError(
                f"sample {batch.ids[int(missing.argmax())]}: the teacher's signals do not have it with these tokens; {AGAIN}"
            )
        return self._order[positions]


def packed(distributions: Sequence[Rows]) -> dict[str, Tensor]:
    """Shard tensors of cached rows, concatenated; draws are stored without padding."""
    tensors: dict[str, list[Tensor]] = {}
    for rows in distributions:
        named = vars(rows)
        if isinstance(rows, Sampled):
            mask = rows.counts > 0
            named = {"tokens": rows.tokens[mask], "counts": rows.counts[mask], "starts": mask.sum(1), "entropy": rows.entropy}
        for name, tensor in named.items():
            tensors.setdefault(name, []).append(tensor)
    concatenated = {name: torch.cat(parts) for name, parts in tensors.items()}
    if "starts" in concatenated:
        concatenated["starts"] = F.pad(concatenated["starts"].cumsum(0), (1, 0)).int()
    return concatenated


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically, without a copy of it in memory."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _load_rows(spans: Sequence[Span], device: torch.device) -> Rows:
    """Rows of all spans, concatenated on `device`."""

    def read(name: str, dtype: torch.dtype, ranges: Sequence[Span] = spans) -> Tensor:
        return torch.cat([shard[name][first:last] for shard, first, last in ranges]).to(device, dtype, non_blocking=True)

    if "starts" not in spans[0][0]:
        return TopK(read("tokens", torch.long), read("log_probs", torch.float32), read("log_tail", torch.float32))
    starts = [shard["starts"][first : last + 1] for shard, first, last in spans]
    drawn = [(shard, int(offsets[0]), int(offsets[-1])) for (shard, _, _), offsets in zip(spans, starts, strict=True)]
    distinct = torch.cat([offsets.diff() for offsets in starts]).to(device)
    filled = torch.arange(int(distinct.max()) if len(distinct) else 0, device=device) < distinct[:, None]
    tokens, counts = (torch.zeros(filled.shape, dtype=torch.long, device=device) for _ in range(2))
    tokens[filled], counts[filled] = read("tokens", torch.long, drawn), read("counts", torch.long, drawn)
    return Sampled(tokens, counts, read("entropy", torch.float32))


def read_manifest(folder: Path, expected: SignalFacts) -> SignalCache:
    """Manifest of the cache in `folder`. Raises DataError without one, or naming the fields that differ from `expected`."""
    cache = SignalManifest.read(folder / "manifest.json").cache
    return _validated(folder, cache, expected, "signals: the live teacher")


def read_evidence(folder: Path, expected: SignalFacts) -> EvidenceKept:
    """Manifest of the evidence in `folder`. Raises as `read_manifest`."""
    evidence = SignalManifest.read(folder / "manifest.json").evidence
    return _validated(folder, evidence, expected, "evidence: none")


def _validated(folder: Path, manifest: ManifestT | None, expected: SignalFacts, description: str) -> ManifestT:
    if manifest is None:
        raise DataError(f"{folder} holds no {description} was asked for when it was made; {AGAIN}")
    differing = [name for name in SignalFacts.model_fields if getattr(manifest.facts, name) != getattr(expected, name)]
    if differing:
        differences = "; ".join(
            f"{name} is {getattr(manifest.facts, name)} there, {getattr(expected, name)} here" for name in differing
        )
        raise DataError(f"{folder} is of another teacher, data or settings: {differences}; {AGAIN}")
    return manifest


def open_shard(path: Path, digest: str) -> dict[str, Tensor]:
    """Tensors of a shard, memory-mapped after one full read for the hash. Raises DataError if it is missing or differs."""
    try:
        if sha256([path]) != digest:
            raise DataError(f"{path}: its bytes are not those that the manifest names: cut short or changed; {AGAIN}")
        with safe_open(path, framework="pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: {error}; {AGAIN}") from None
