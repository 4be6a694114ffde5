"""`alignti export`: cast, sharded checkpoint folder, verified by reloading it with stock transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from components.config.settings import Settings
from components.dataset.shards import Sample, Samples
from components.distill.export import save
from components.errors import InputError, ModelError
from components.evaluate.generate import answers, questions
from components.io import whole_folder
from components.models.checkpoint_folder import weight_files
from components.models.collate import Collator
from components.models.families import family_of, prompt
from components.models.load import Loaded
from components.models.processor import load_processor
from components.models.template import Template
from components.records.paths import DATASET, ROWS
from components.release import arguments, card
from components.release.model import ADAPTER, base_folder, find, open_model, template_of

DTYPES: dict[str, torch.dtype] = dict(zip(arguments.DTYPES, (torch.float32, torch.float16, torch.bfloat16), strict=True))
SAFETENSORS_DTYPES = {"F64": "fp32", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
# Maximum KL(original in float32 || export in its dtype) per answer token, nats: mantissas of 23, 10 and 7 bits.
TOLERANCE = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 2e-2}
COMPARED_SAMPLES = 8


@dataclass(frozen=True)
class Exported:
    """Written files, and the comparison of the reloaded model with the original."""

    folder: Path
    files: int
    size_bytes: int
    dtype: str
    kl: float  # nats per answer token
    same_answers: int
    samples: int  # compared
    missing: list[str]  # missing entries of the card
    gguf: bool

    def __str__(self) -> str:
        lines = [
            f"export: {self.files} files, {self.size_bytes / 2**20:,.1f} MiB in {self.dtype} -> {self.folder}",
            f"Read back with stock transformers, on {self.samples} prepared samples: every weight as it was, rounded;"
            f" KL {self.kl:.1g} nats a token (at most {TOLERANCE[self.dtype]:g}); {self.same_answers} of {self.samples} greedy"
            " answers the same.",
            *(f"The card lacks {entry}." for entry in self.missing),
        ]
        if self.gguf:
            lines.append(
                f"GGUF: llama.cpp's convert_hf_to_gguf.py {self.folder}, and again with --mmproj; see docs/students.md."
            )
        return "\n".join(lines)


def export(name: str, folder: Path, settings: Settings, dtype: str | None, shard: str, force: bool) -> Exported:
    """Export the model `name` to `folder`, atomically.

    Args:
        dtype: fp32, fp16 or bf16; None: the stored dtype.
        shard: maximum size of a weight file, such as 5GB.
        force: replace an existing model at `folder`.

    Raises:
        InputError, ModelError, DataError: no such model; `folder` exists; no samples for the comparison; the reloaded weights
            differ from the written ones, or the KL exceeds TOLERANCE.
        TryAgainError: the disk is full, or the hub does not respond.
    """
    arguments.check_export(folder, dtype, shard, force)
    ref = find(name, settings)
    own = [ref.path, *([base_folder(ref.path)] if (ref.path / ADAPTER).exists() else [])]
    if folder.resolve() in [path.resolve() for path in own]:
        raise InputError(
            f"{folder} is the folder of {name} itself, or of its base, which --force would replace; choose another"
        )
    source = open_model(ref.path, "cpu")
    dtype = dtype or stored_dtype(ref.path)
    template = template_of(ref, source, settings)
    export_template = template.of(source.processor)
    samples = comparison_samples(settings)
    original = Answers.collect(source, samples, template, settings)
    source.model.to(DTYPES[dtype])
    text, missing = card.full_card(ref.arm, folder, dtype) if ref.arm in settings.study.arms else (_readme(ref.path), [])
    with whole_folder(folder) as draft:
        save(draft, source, export_template, text, max_shard_size=shard)
        for pattern in ("LICENSE*", "NOTICE*"):
            for file in ref.path.glob(pattern):
                shutil.copy2(file, draft / file.name)
        reloaded = reload_exported(draft)
        _check_same_weights(source.model, reloaded.model, folder)
        saved_template = Template("" if template.style == "vicuna" else template.system, style="processor")
        exported = Answers.collect(reloaded, samples, saved_template, settings)
        kl = original.divergence(exported)
        if not kl <= TOLERANCE[dtype]:
            raise ModelError(
                f"{name} in {dtype} answers differently: KL {kl:.2g} nats a token on {len(samples)} prepared samples, more than"
                f" {TOLERANCE[dtype]:g}; {folder} was not written; export with --dtype fp32, or bf16 if this was fp16"
            )
    files = [file for file in folder.rglob("*") if file.is_file()]
    return Exported(
        folder=folder,
        files=len(files),
        size_bytes=sum(file.stat().st_size for file in files),
        dtype=dtype,
        kl=kl,
        same_answers=sum(a == b for a, b in zip(original.texts, exported.texts, strict=True)),
        samples=len(samples),
        missing=missing,
        gguf=family_of(source.model.config).gguf,
    )


def comparison_samples(settings: Settings) -> list[Sample]:
    """First COMPARED_SAMPLES questions of the evaluated split. Raises DataError if there is no data set."""
    samples = Samples(DATASET, settings.evaluate.split, ROWS)
    return [samples[row] for row in questions(samples)[:COMPARED_SAMPLES]]


def stored_dtype(path: Path) -> str:
    """Stored dtype of a folder's weights, from its first floating-point tensor; for adapters their base model's."""
    folder = base_folder(path) if (path / ADAPTER).is_file() else path
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            dtypes = (weights.get_slice(key).get_dtype() for key in weights.keys())  # noqa: SIM118
            if name := next((SAFETENSORS_DTYPES[dtype] for dtype in dtypes if dtype in SAFETENSORS_DTYPES), None):
                return name
    raise ModelError(f"{path}: no floating-point weights")


def reload_exported(folder: Path) -> Loaded:
    """Exported model, loaded with stock transformers."""
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", local_files_only=True)
    return Loaded(model.eval(), load_processor(folder))


@dataclass(frozen=True)
class Answers:
    """Greedy answers and teacher-forced log-probabilities of a model on some samples."""

    texts: list[str]  # greedy answers
    log_probs: list[Tensor]  # per sample (R, V), float32, at the tokens of the reference answer

    @classmethod
    def collect(cls, loaded: Loaded, samples: list[Sample], template: Template, settings: Settings) -> Answers:
        max_length = settings.models.max_length
        texts = answers(loaded, samples, range(len(samples)), template, max_length, settings.evaluate, "export: answers")
        collator = Collator(loaded.processor, template, max_length, train=True)
        return cls(texts, [_log_probs(loaded, collator, sample) for sample in samples])

    def divergence(self, other: Answers) -> float:
        """Mean KL(self || other) over all answer tokens, nats."""
        pairs = zip(self.log_probs, other.log_probs, strict=True)
        kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
        return float(kl.mean())


@torch.inference_mode()
def _log_probs(loaded: Loaded, collator: Collator, sample: Sample) -> Tensor:
    batch = collator([sample])
    if batch.pixel_values is not None:
        batch = replace(batch, pixel_values=batch.pixel_values.to(loaded.model.dtype))
    logits = loaded.model(**prompt(loaded.model, batch)).logits
    return logits[0, :-1][batch.response[0, 1:]].float().log_softmax(-1)


def _check_same_weights(saved: Any, reloaded: Any, folder: Path) -> None:
    reloaded_weights = reloaded.state_dict()
    for key, weight in saved.state_dict().items():
        if key not in reloaded_weights or not torch.equal(weight, reloaded_weights[key]):
            raise ModelError(f"{folder} was not written: {key} does not come back as it was saved; is the disk sound?")


def _readme(path: Path) -> str:
    """Model card of the checkpoint, or a stub that names the base of merged adapters."""
    if (path / "README.md").is_file():
        return (path / "README.md").read_text(encoding="utf-8", errors="replace")
    description = "Exported as it was; it had no card."
    if (path / ADAPTER).is_file():
        description = f"LoRA adapters folded into {json.loads((path / ADAPTER).read_bytes())['base_model_name_or_path']}."
    return f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n# {path.name}\n\n{description}\n"
