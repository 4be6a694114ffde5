"""Builder of the teacher cache: one teacher pass over the training samples, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from components.align_ti.batch import Batch, predicting
from components.align_ti.cached import Rows
from components.align_ti.head import rows_per_chunk
from components.align_ti.sampled import Sampled, sampled
from components.align_ti.top_k import TopK, top_k
from components.align_ti.visual_weights import visual_weights
from components.dataset.shards import CAPTION, Sample, Samples
from components.errors import DataError
from components.irs.centred import centred_in_batch
from components.models.attention import AttentionProbe, probing
from components.models.collate import Collator
from components.models.families import family_of
from components.models.vlm import VLM
from components.records.teacher_cache import SignalFacts
from components.teacher_cache.store import KEY, keys, packed, write_shard


@dataclass(frozen=True)
class TeacherPass:
    """Teacher forward pass and encoding of its distributions.

    Log-probabilities and entropies are stored in float16, whose rounding is small against the error of the cut at k, and in
    float32 where k covers the vocabulary (docs/performance.md has the figures).
    """

    vlm: VLM
    collator: Collator
    facts: SignalFacts
    shared_vocabulary: int
    chunk_mib: float
    background: Tensor | None  # (Nv,) attention background, for `centred`; None: no centring

    @property
    def chunk_rows(self) -> int:
        return rows_per_chunk(len(self.vlm.head.weight), self.chunk_mib)

    @property
    def dtype(self) -> torch.dtype:
        covers_vocabulary = self.facts.kind == "top_k" and self.facts.top_k >= self.shared_vocabulary
        return torch.float32 if covers_vocabulary else torch.float16

    @torch.inference_mode()
    def forward(self, samples: Sequence[Sample]) -> tuple[Batch, Tensor, Tensor]:
        """Collated batch, hidden states (B, T, d), and (N,) weights of its visual rows."""
        batch = self.collator(samples).to(self.vlm.model.device)
        layer, bf16 = self.facts.layer, self.facts.precision == "bf16"
        probe = AttentionProbe.from_masks(batch.instruction, batch.pictures)
        autocast = torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=bf16)
        with autocast, probing(self.vlm.model, [layer], probe):
            hidden, _ = self.vlm.plain(batch, self.vlm.features(batch), keep=False)
        weights = probe.maps[layer]
        if self.background is not None:
            weights = centred_in_batch(weights, self.background, batch.pictures, batch.ids)
        return batch, hidden, visual_weights(weights, batch.pictures)

    @torch.inference_mode()
    def encode(self, hidden: Tensor, uniform: Tensor) -> Iterator[Rows]:
        """Encoded distributions at hidden rows (N, d), per chunk, on the CPU in storage dtypes; `uniform` (N,) fixes draws."""
        facts, token_dtype = self.facts, torch.int16 if self.shared_vocabulary <= 2**15 else torch.int32
        for rows, chunk_uniforms in zip(hidden.split(self.chunk_rows), uniform.split(self.chunk_rows), strict=True):
            logits = self.vlm.head(rows)[:, : self.shared_vocabulary]
            if facts.kind == "top_k":
                top = top_k(logits, facts.top_k, facts.temperature)
                yield TopK(
                    top.tokens.to("cpu", token_dtype), top.log_probs.to("cpu", self.dtype), top.log_tail.to("cpu", self.dtype)
                )
            else:
                sampled_rows = sampled(logits, facts.draws, chunk_uniforms, facts.temperature)
                tokens, counts = sampled_rows.tokens.to("cpu", token_dtype), sampled_rows.counts.to("cpu", torch.uint8)
                yield Sampled(tokens, counts, sampled_rows.entropy.to("cpu", self.dtype))


@dataclass
class Shard:
    """Accumulator of one shard's tensors (layout in store.py)."""

    distributions: list[Rows] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    samples: list[tuple[int, ...]] = field(default_factory=list)
    blocks: dict[tuple[str, bytes], int] = field(default_factory=dict)  # image id and what its tokens see -> first row
    rows: int = 0
    weights: int = 0

    def add(self, teacher_pass: TeacherPass, samples: Sequence[Sample]) -> None:
        batch, hidden, attention = teacher_pass.forward(samples)
        text = predicting(batch.response)
        whole = family_of(teacher_pass.vlm.model.config).images_see_question
        is_new = self._assign_rows(samples, batch, text, whole)
        generator = torch.Generator().manual_seed(int(self.samples[-1][KEY]) % 2**63)  # equal draws in a resumed build
        for rows in (text, batch.visual & is_new[:, None]):
            self.distributions += teacher_pass.encode(
                hidden[rows], torch.rand(int(rows.sum()), generator=generator, dtype=torch.float64)
            )
        self.attention.append(attention.float().cpu())

    def _assign_rows(self, samples: Sequence[Sample], batch: Batch, text: Tensor, whole: bool) -> Tensor:
        """Assign row offsets to each sample. Returns (B,) bool: True if its visual rows are not in the shard yet; with `whole`
        they are those of an equal text, else of an equal prefix."""
        texts, visuals = text.sum(1).tolist(), batch.visual.sum(1).tolist()
        is_new = torch.zeros(len(samples), dtype=torch.bool)
        first, last = self.rows, self.rows + sum(texts)
        for i, (sample, sample_key) in enumerate(zip(samples, keys(batch), strict=True)):
            seen = batch.attention_mask[i].sum()[None] if whole else batch.visual[i].nonzero().flatten()[-1:] + 1
            block = (sample.image_id, batch.input_ids[i, : int(seen)].cpu().numpy().tobytes() if len(seen) else b"")
            if block not in self.blocks:
                self.blocks[block] = last
                last += visuals[i]
                is_new[i] = True
            self.samples.append((sample_key, first, texts[i], self.blocks[block], visuals[i], self.weights))
            first += texts[i]
            self.weights += visuals[i]
        self.rows = last
        return is_new.to(batch.visual.device)

    def write(self, path: Path) -> None:
        tensors = {**packed(self.distributions), "attention": torch.cat(self.attention), "samples": torch.tensor(self.samples)}
        write_shard(path, tensors)


def build(teacher_pass: TeacherPass, samples: Samples, batch_size: int, folder: Path) -> list[Path]:
    """Write the shards missing from `folder`; returns the paths of all shards, in order.

    Raises DataError if there is no instruction to distil on.
    """
    is_instruction = [kind != CAPTION for kind in samples.kinds]
    if not any(is_instruction):
        raise DataError("the train split has no instruction to distil on; see artifacts/dataset/card.md")
    paths, first = [], 0
    with tqdm(total=sum(is_instruction), desc="the teacher's signals", unit="sample") as bar:
        for number, record in enumerate(samples.record.shards):
            images = range(first, first := first + record.images)
            count = sum(is_instruction[samples.of_image(images.start).start : samples.of_image(images[-1]).stop])
            if not count:
                continue
            paths.append(folder / f"shard-{number:05d}.safetensors")
            if not paths[-1].exists():
                shard = Shard()
                for batch in _batches(samples, images, batch_size):
                    shard.add(teacher_pass, batch)
                    bar.update(len(batch))
                shard.write(paths[-1])
            else:
                bar.update(count)
    return paths


def _batches(samples: Samples, images: range, size: int) -> Iterator[list[Sample]]:
    """Batches of the instructions about these images, grouped by image."""
    pending: list[Sample] = []
    for row in images:
        pending += [sample for sample in samples.about(row) if sample.kind != CAPTION]
        while len(pending) >= size:
            yield pending[:size]
            pending = pending[size:]
    if pending:
        yield pending
