"""Replay of a step with a non-finite loss, sample by sample, to find the sample and the term.

`alignti replay .runs/dumps/ARM-step-N`
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from components.align_ti.batch import Batch
from components.align_ti.step import AlignTI, Method, total
from components.config.names import check_dump
from components.distill.checkpoint import collective_draft
from components.distill.teacher import FrozenTeacher
from components.errors import DataError, ModelError
from components.io import sha256, write_text
from components.models.load import load
from components.models.vlm import VLM
from components.records.paths import DUMPS

if TYPE_CHECKING:
    from components.distill.assemble import Job

PREFIX = "image_inputs."
TENSORS = ("input_ids", "attention_mask", "response", "instruction", "pictures", "pixel_values", "dependence")


def dump(
    job: Job, step: int, state: dict[str, Tensor], batches: list[tuple[Batch, list[int]]], values: dict[str, float]
) -> Path:
    """Write `.runs/dumps/ARM-step-N`: micro-batches of every rank, the rest by the main process. Collective.

    Models are referenced by path and hash, not copied.

    Args:
        state: full state dict of the module before the step.
        values: the step's term means and gradient norm.
    """
    accelerator, module, choice = job.accelerator, job.module, job.choice
    folder = DUMPS / f"{job.name}-step-{step}"
    with collective_draft(accelerator, folder) as draft:
        for i, (batch, keys) in enumerate(batches):
            name = f"rank-{accelerator.process_index}-batch-{i}"
            tensors = {key: getattr(batch, key) for key in TENSORS} | {f"{PREFIX}{k}": v for k, v in batch.image_inputs.items()}
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in tensors.items() if v is not None}, draft / f"{name}.safetensors"
            )
            write_text(draft / f"{name}.json", json.dumps({"ids": batch.ids, "image_ids": batch.image_ids, "keys": keys}))
        if accelerator.is_main_process:
            save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, draft / "student.safetensors")
            teacher, live_teacher = module.live_teacher, None
            if isinstance(teacher, FrozenTeacher):
                live_teacher = {
                    "layer": teacher.layer,
                    "shares_tower": teacher.shares_tower,
                    "background": None if teacher.background is None else teacher.background.tolist(),
                    "gradient": teacher.gradient,
                }
            metadata = {
                "arm": job.name,
                "student": job.start.model_dump(include={"path", "sha256"}),
                "teacher": choice and choice.model_dump(include={"path", "sha256"}),
                "precision": job.distill.precision,
                "step": step,
                "record": {name: str(value) for name, value in values.items()},
                "method": asdict(module.method),
                "progress": module.progress,
                "live_teacher": live_teacher,
            }
            write_text(draft / "dump.json", json.dumps(metadata, indent=2))
    return folder


@dataclass(frozen=True)
class Finding:
    """Non-finite values of one sample."""

    sample: str
    precision: str
    values: dict[str, float]  # term or "gradient norm" -> value

    def __str__(self) -> str:
        return f"sample {self.sample} ({self.precision}): " + ", ".join(f"{k} is {v}" for k, v in self.values.items())


def replay(folder: Path) -> Iterator[str | Finding]:
    """Rerun the dumped step sample by sample on the CPU, in its own precision and, if that was bf16, in float32 too.

    Yields non-finite values: first of the student's weights and the pixels, then per sample.

    Raises:
        InputError: the folder is not a dump.
        DataError: dump.json is damaged.
        ModelError: a model is missing or changed, or the step had no live teacher, edits, adapters, or inseparable images.
    """
    metadata = _metadata(folder)
    if metadata["live_teacher"] is None:
        raise ModelError(
            f"{folder}: the step ran without the live teacher, or with one on another grid; it cannot be run again"
        )
    if metadata["method"]["weights"].get("mcd"):
        raise ModelError(f"{folder}: the step had edited samples (L_mcd), which a dump does not hold; look at the batch")
    for role in ("student", "teacher"):
        path = Path(metadata[role]["path"])
        if not path.exists() or sha256([path]) != metadata[role]["sha256"]:
            raise ModelError(f"{folder}: the {role} at {path} is missing or has changed since; `dvc checkout` brings it back")
    state = load_file(folder / "student.safetensors")
    if any("lora_" in name for name in state):
        raise ModelError(f"{folder}: the step trained adapters (trainable.lora), which replay cannot build; look at the batch")
    yield from (f"student's weights before the step: {name} is not finite" for name in _non_finite(state.items()))
    batches = [_read(path) for path in sorted(folder.glob("rank-*.safetensors"))]
    if any(b.pixel_values is not None and (b.image_inputs or len(b.pixel_values) != len(b.image_ids)) for b, _ in batches):
        raise ModelError(
            f"{folder}: replay takes samples apart, which it can where an image is one block of pixels, as LLaVA-1.5's is; the"
            " batch, with its pixels, lies there to be looked at"
        )
    for batch, _ in batches:
        pixels: Iterable[Tensor] = () if batch.pixel_values is None else batch.pixel_values
        yield from (f"pixels of image {name} are not finite" for name in _non_finite(zip(batch.image_ids, pixels, strict=True)))
    for precision in dict.fromkeys((metadata["precision"], "fp32")):
        module = _module(metadata, state, precision)
        for batch, keys in batches:
            for i in tqdm(range(len(keys)), desc=f"replay in {precision}", unit="sample"):
                if values := _not_finite(module, _single_sample(batch, i), keys[i], precision):
                    yield Finding(batch.ids[i], precision, values)


def _metadata(folder: Path) -> dict[str, Any]:
    check_dump(folder)
    try:
        metadata: dict[str, Any] = json.loads((folder / "dump.json").read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{folder}/dump.json is damaged") from None
    return metadata


def _read(path: Path) -> tuple[Batch, list[int]]:
    names = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    tensors: dict[str, Any] = dict.fromkeys(TENSORS) | load_file(path)
    image_inputs = {name.removeprefix(PREFIX): tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}
    return Batch(ids=names["ids"], image_ids=names["image_ids"], image_inputs=image_inputs, **tensors), names["keys"]


def _module(metadata: dict[str, Any], state: dict[str, Tensor], precision: str) -> AlignTI:
    student = VLM(load(Path(metadata["student"]["path"]), "cpu").model)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    teacher = VLM(load(Path(metadata["teacher"]["path"]), "cpu", dtype).model)
    method = {field.name: metadata["method"][field.name] for field in fields(Method)}
    live_teacher = metadata["live_teacher"]
    background = None if live_teacher["background"] is None else torch.tensor(live_teacher["background"])
    frozen = FrozenTeacher(teacher, live_teacher["layer"], live_teacher["shares_tower"], background, live_teacher["gradient"])
    module = AlignTI(student, frozen, Method(**method))
    module.progress = metadata["progress"]
    module.load_state_dict(state)
    return module


def _single_sample(batch: Batch, i: int) -> Batch:
    """Batch of sample i alone, without padding."""
    length = int(batch.attention_mask[i].sum())
    tables = {name: getattr(batch, name) for name in TENSORS if name != "pixel_values"}
    rows = {name: table[i : i + 1, :length] for name, table in tables.items() if table is not None}
    start, count = int(batch.pictures[:i].amax(1).sum()), int(batch.pictures[i].max())
    images = slice(start, start + count)
    pixels = batch.pixel_values[images] if batch.pixel_values is not None and count else None
    return replace(batch, ids=[batch.ids[i]], image_ids=batch.image_ids[images], pixel_values=pixels, **rows)


def _not_finite(module: AlignTI, batch: Batch, key: int, precision: str) -> dict[str, float]:
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
        terms = module(batch, [key])
    values = dict(zip(module.method.terms, (terms.sums / terms.counts.clamp_min(1)).tolist(), strict=True))
    total(terms.sums, terms.counts, module.method.weight_vector()).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.norm() for p in module.parameters() if p.grad is not None]
    values["gradient norm"] = float(torch.stack(gradients).norm())
    return {name: value for name, value in values.items() if not math.isfinite(value)}


def _non_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [name for name, tensor in tensors if not bool(tensor.isfinite().all())]
