"""Evidence search: words and visual tokens of a training sample that the teacher's answer depends on most, for L_mcd; and the
image dependence of each answer token, for L_va_kd.

For L_mcd samples qualify if the teacher's argmax equals every answer token. Embeddings e of question words and image are
interpolated with b, those of a partner: a sample of the shard with another image on the same visual grid. Evidence of kind
`gradient` has the highest positive (e_j - b_j) ds/de_j at b + alpha (e - b), s the mean log-probability of the answer, alpha
uniform, drawn once; kind `random` fills the same maximal share at random. Source: MCD, arXiv 2609.39920.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from components.align_ti.batch import Batch, predicting
from components.align_ti.divergence import divergence
from components.align_ti.image_dependence import EDITS, image_dependence
from components.align_ti.top_k import with_residual
from components.dataset.shards import CAPTION, Sample, Samples
from components.models.attribution import attributions
from components.models.collate import Collator
from components.models.vlm import VLM
from components.teacher_cache.evidence import donor
from components.teacher_cache.store import write_shard

TOKENS = 128  # likeliest tokens of each distribution; up to twice as many are stored per row

Entry = dict[str, Tensor]  # one sample's rows of each tensor of a file (layout in evidence.py)


class Search(Protocol):
    """Interface of the teacher passes that `find` runs, shard by shard."""

    @property
    def samples(self) -> Samples: ...
    @property
    def kinds(self) -> Sequence[str]: ...
    def candidates(self, images: range) -> list[Any]:
        """Search candidates of these images."""

    def __call__(self, candidates: list[Any], /) -> dict[str, list[Entry]]:
        """Entries per kind of a batch of candidates."""


@dataclass(frozen=True)
class DependencePass:
    """Teacher passes with the image and with each edit of it, over every question about one."""

    vlm: VLM
    collate: Collator
    samples: Samples
    kinds: Sequence[str]
    shared_vocabulary: int
    bf16: bool = False

    def candidates(self, images: range) -> list[int]:
        about = ((i, s) for row in images for i, s in zip(self.samples.of_image(row), self.samples.about(row), strict=True))
        return [index for index, sample in about if sample.kind != CAPTION and sample.images]

    @torch.no_grad()
    def __call__(self, indices: list[int]) -> dict[str, list[Entry]]:
        batch = self.collate([self.samples[index] for index in indices]).to(self.vlm.model.device)
        rows, gold, counts = predicting(batch.response), batch.input_ids[batch.response], batch.response.sum(1).tolist()
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=self.bf16):
            seen, *edited = (
                self.vlm.plain(view, self.vlm.features(view), keep=False)[0][rows]
                for view in (batch, *(EDITS[kind](batch) for kind in self.kinds))
            )
            found = [image_dependence(self.vlm.head, seen, hidden, gold, self.shared_vocabulary).cpu() for hidden in edited]
        return {
            kind: [
                {"samples": torch.tensor([[index, len(values)]]), "effects": values.mean()[None], "dependence": values}
                for index, values in zip(indices, dependence.split(counts), strict=True)
            ]
            for kind, dependence in zip(self.kinds, found, strict=True)
        }


@dataclass(frozen=True)
class EvidencePass:
    """Teacher passes that find evidence.

    Args:
        share: maximal share of a sample's words and visual tokens that is evidence.
        collate: from `evidence.collator`.
    """

    vlm: VLM
    collate: Collator
    samples: Samples
    kinds: Sequence[str]
    share: float
    shared_vocabulary: int
    bf16: bool = False

    def candidates(self, images: range) -> list[tuple[int, int]]:
        """(sample, partner) pairs of single-image questions whose images differ but share a visual grid; none: skipped."""
        by_grid: dict[Any, list[tuple[int, int, Sample]]] = {}
        for row in images:
            for index, sample in zip(self.samples.of_image(row), self.samples.about(row), strict=True):
                if sample.kind != CAPTION and len(sample.images) == 1:
                    by_grid.setdefault(_grid(self.collate, sample), []).append((row, index, sample))
        pairs = []
        for entries in by_grid.values():
            for row, index, sample in entries:
                others = [other for other_row, other, _ in entries if other_row != row]
                if others:
                    pairs.append((index, random.Random(f"partner {sample.id}").choice(others)))
        return sorted(pairs)

    @torch.no_grad()
    def __call__(self, pairs: list[tuple[int, int]]) -> dict[str, list[Entry]]:
        """Evidence per kind of (sample, partner) pairs, for samples that the teacher answers correctly."""
        pairs = [pair for pair, correct in zip(pairs, self._right([sample for sample, _ in pairs]), strict=True) if correct]
        entries: dict[str, list[Entry]] = {kind: [] for kind in self.kinds}
        if not pairs:
            return entries
        pair_samples = [self.samples[sample] for sample, _ in pairs]
        device = self.vlm.model.device
        batch = self.collate(pair_samples)
        donor_batch = donor(batch, self.collate([self.samples[partner] for _, partner in pairs])).to(device)
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            features, donor_embeds = self.vlm.features(batch), self.vlm.embedded(donor_batch, self.vlm.features(donor_batch))
            generators = [random.Random(f"evidence {sample.id}") for sample in pair_samples]
            alpha = torch.tensor([[g.random()] for g in generators], device=device).expand(batch.input_ids.shape)
            slopes = attributions(self.vlm, batch, features, donor_embeds, alpha, self.shared_vocabulary)
            whole = self._logits(batch, self.vlm.plain(batch, features, keep=False)[0])
            for kind in self.kinds:
                places = [self._positions(kind, batch, row, slopes[row], generators[row]) for row in range(len(pairs))]
                evidence = torch.zeros(batch.input_ids.shape, device=device)
                for row, positions in enumerate(places):
                    evidence[row, positions] = 1.0
                alone, without = (
                    self._logits(batch, self.vlm.mixed(batch, features, donor_embeds, keep))
                    for keep in (evidence, 1 - evidence)
                )
                for row, (sample, partner) in enumerate(pairs):
                    effect = divergence(whole[row], without[row], "jsd") - divergence(whole[row], alone[row], "jsd")
                    stored = self._compress(whole[row].softmax(-1), without[row].softmax(-1))
                    if len(places[row]):
                        table = torch.tensor([[sample, partner, len(whole[row]), len(places[row])]])
                        entry = {"samples": table, "effects": effect.mean()[None].cpu(), "places": places[row].int().cpu()}
                        entries[kind].append(entry | stored)
        return entries

    def _right(self, samples: list[int]) -> list[bool]:
        """True per sample if the teacher's argmax equals every answer token (teacher forcing)."""
        batch = self.collate([self.samples[sample] for sample in samples]).to(self.vlm.model.device)
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden, _ = self.vlm.plain(batch, self.vlm.features(batch), keep=False)
        gold = [row[answer] for row, answer in zip(batch.input_ids, batch.response, strict=True)]
        logits = self._logits(batch, hidden)
        return [torch.equal(sample_logits.argmax(-1), target) for sample_logits, target in zip(logits, gold, strict=True)]

    def _logits(self, batch: Batch, hidden: Tensor) -> list[Tensor]:
        """Logits (R, V) per sample at the rows that predict its response, V the shared vocabulary."""
        rows = predicting(batch.response)
        return [self.vlm.head(states[mask])[:, : self.shared_vocabulary] for states, mask in zip(hidden, rows, strict=True)]

    def _positions(self, kind: str, batch: Batch, row: int, slopes: Tensor, generator: random.Random) -> Tensor:
        """(P,) positions of one sample's evidence."""
        candidates = (batch.instruction[row] | batch.visual[row]).nonzero()[:, 0]
        limit = max(1, int(self.share * len(candidates)))
        if kind == "random":
            return candidates[sorted(generator.sample(range(len(candidates)), limit))]
        highest = candidates[slopes[candidates].argsort(descending=True, stable=True)[:limit]]
        return highest[slopes[highest] > 0].sort().values

    @staticmethod
    def _compress(whole: Tensor, without: Tensor) -> Entry:
        """Compression of two distributions (R, V): (R, W) tokens, the likeliest of either first, and (R, W + 1) probabilities
        plus residual mass of each."""
        V = whole.shape[-1]
        likeliest = torch.zeros_like(whole)
        for p in (whole, without):
            likeliest.scatter_(-1, p.topk(min(TOKENS, V)).indices, 1.0)
        tokens = (likeliest + torch.maximum(whole, without)).topk(min(2 * TOKENS, V)).indices
        dtype = torch.float16 if tokens.shape[1] < whole.shape[1] else torch.float32
        index = torch.int16 if whole.shape[1] <= 2**15 else torch.int32
        kept_whole, kept_without = (with_residual(p, tokens).to("cpu", dtype) for p in (whole, without))
        return {"tokens": tokens.to("cpu", index), "whole": kept_whole, "without": kept_without}


def find(search: Search, size: int, folder: Path) -> tuple[dict[str, list[Path]], int]:
    """Write the evidence files missing from `folder`, in batches of `size` samples; returns the paths per kind, in order, and
    the number of samples searched."""
    paths: dict[str, list[Path]] = {kind: [] for kind in search.kinds}
    searched, first = 0, 0
    for number, record in enumerate(tqdm(search.samples.record.shards, desc="evidence", unit="shard")):
        images = range(first, first := first + record.images)
        candidates = search.candidates(images) if search.kinds else []
        searched += len(candidates)
        files = {kind: folder / f"evidence-{kind}-{number:05d}.safetensors" for kind in search.kinds}
        if not all(path.is_file() for path in files.values()):
            passes = [search(candidates[start : start + size]) for start in range(0, len(candidates), size)]
            for kind, path in files.items():
                _write([entry for batch_evidence in passes for entry in batch_evidence[kind]], path)
        for kind, path in files.items():
            if path.is_file():
                paths[kind].append(path)
    return paths, searched


def _grid(collate: Collator, sample: Sample) -> Any:
    """Key of an image's visual grid: its placeholder text, the shape of its pixels, the values of its other inputs."""
    (image,) = collate.images([sample])
    other_inputs = [tensor.numpy().tobytes() for name, tensor in sorted(image.tensors.items()) if name != "pixel_values"]
    return image.texts, image.tensors["pixel_values"].shape, *other_inputs


def _write(entries: list[Entry], path: Path) -> None:
    """Write one evidence file atomically; no file without evidence."""
    if entries:
        write_shard(path, {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]})
