"""Stage `distill@ARM`: one student, distilled as its arm of params/study.yaml says.

python -m components.distill --arm align_ti
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from components import tracking
from components.align_ti.step import AlignTI, Method
from components.artifacts import DATASET, IRS, MODELS, STUDENTS, TEACHER, Cost, LayerChoice, ModelIndex, TeacherChoice
from components.distill.checkpoint import Checkpoints, fingerprint
from components.distill.export import export, model_card
from components.distill.loop import train
from components.distill.order import Order
from components.distill.teacher import FrozenTeacher, same_tower
from components.errors import ModelError, exit_from
from components.models.collate import Collator
from components.models.load import Loaded, check_pair, load
from components.models.template import Template
from components.models.vlm import VLM
from components.runtime import peak_memory_mib, prepare_torch
from components.settings import Arm, DistillSettings, Settings, load_settings
from components.shards import CAPTION, Samples


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m components.distill", description=__doc__)
    parser.add_argument("--arm", required=True, help="a name under `arms:` in params/study.yaml")
    name = parser.parse_args().arm
    settings = load_settings()
    arm = settings.arm(name)
    with tracking.stage_run("distill", name, runtime=settings.runtime, params=arm.model_dump(mode="json")) as run:
        cost = distill(name, arm, settings, run)
        run.metrics({"cost/train_seconds": cost.train_seconds, "cost/peak_memory_mib": cost.peak_memory_mib})
    print(
        f"distill@{name}: {cost.steps:,} steps in {cost.train_seconds:.0f} s, peak {cost.peak_memory_mib:,.0f} MiB"
        f" -> {STUDENTS / name / 'model'}"
    )


def distill(name: str, arm: Arm, settings: Settings, run: tracking.Run) -> Cost:
    """Train and export one arm. Returns what it took."""
    device = prepare_torch(settings.runtime, arm.seed)
    bf16 = settings.distill.precision == "bf16"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if bf16 else "no")
    device = accelerator.device
    samples = Samples(DATASET, "train")
    choice = TeacherChoice.read(TEACHER / "choice.json")
    layer = LayerChoice.read(IRS / "layer.json").layer
    start = ModelIndex.read(MODELS / "index.json").students[arm.student]
    facts = {
        "arm": arm.model_dump(mode="json"),
        "distill": settings.distill.model_dump(mode="json", exclude={"iva", "tpa", "divergence", "log_every"}),
        "template": settings.models.template.model_dump(mode="json"),
        "dataset": samples.manifest.digest,
        "teacher": {"name": choice.name, "sha256": choice.sha256},
        "irs_layer": layer,
        "student": {"name": start.name, "sha256": start.sha256},
    }
    run.dataset("train", samples.manifest.digest[:32])

    student = load(Path(start.path), device)
    teacher = load(Path(choice.path), device, torch.bfloat16 if bf16 else torch.float32)
    shared = check_pair(teacher, student)
    _freeze(student, settings.distill)
    module = _module(arm, settings.distill, student, teacher, shared, layer)
    collator = Collator(student.processor, Template(settings.models.template.system), settings.models.max_length, train=True)
    instructions = [i for i, kind in enumerate(samples.kinds) if kind != CAPTION]  # captions belong to the models' first stage
    order = Order(instructions, settings.distill.batch_size, arm.seed)
    with Checkpoints(name, fingerprint({**facts, "steps_logged": settings.distill.log_every})) as checkpoints:
        outcome = train(
            module, samples, collator, order, settings.distill, accelerator, checkpoints, run, title=f"distill@{name}"
        )
        cost = Cost(
            train_seconds=round(outcome.seconds, 3),
            peak_memory_mib=round(peak_memory_mib(device), 1),
            device=str(device),
            steps=outcome.steps,
        )
        if accelerator.is_main_process:
            export(STUDENTS / name, student, collator.template, model_card(name, facts), outcome.losses, cost)
            checkpoints.clear()
    return cost


def _module(
    arm: Arm, distill: DistillSettings, student: Loaded, teacher: Loaded, shared_vocabulary: int, layer: int
) -> AlignTI:
    assert arm.iva is not None and arm.tpa is not None and arm.divergence is not None  # filled in by Settings.arm
    method = Method(
        weights=arm.weights.model_dump(),
        **arm.divergence.model_dump(),
        chunk_rows=distill.divergence_chunk_rows,
        uniform=arm.iva.weighting == "uniform",
        **arm.tpa.model_dump(),
        eos=student.processor.tokenizer.eos_token_id,
        shared_vocabulary=shared_vocabulary,
        route="expanded" if distill.gradient_checkpointing else "continuation",
    )
    pupil, master = VLM(student.model), VLM(teacher.model)
    frozen_tower = not distill.trainable.vision_tower
    look = _look(arm, layer, teacher)
    return AlignTI(pupil, FrozenTeacher(master, look, frozen_tower and same_tower(pupil, master)), method)


def _look(arm: Arm, layer: int, teacher: Loaded) -> int:
    """The teacher's layer whose attention weighs the visual tokens. Raises ModelError if the teacher has no such layer."""
    assert arm.iva is not None
    chosen = layer if arm.iva.layer is None else arm.iva.layer
    layers: int = teacher.model.config.get_text_config().num_hidden_layers
    if chosen >= layers:
        raise ModelError(f"iva.layer is {chosen}, but teacher {teacher.name} has layers 0..{layers - 1}")
    return chosen


def _freeze(student: Loaded, distill: DistillSettings) -> None:
    """Only the parts that params/distill.yaml names are trained."""
    parts: dict[str, Any] = {
        "vision_tower": student.model.model.vision_tower,
        "projector": student.model.model.multi_modal_projector,
        "language_model": student.model.model.language_model,
    }
    student.model.get_output_embeddings().requires_grad_(distill.trainable.language_model)
    for part, module in parts.items():
        module.requires_grad_(getattr(distill.trainable, part))
    if distill.gradient_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})


if __name__ == "__main__":
    exit_from(main)
