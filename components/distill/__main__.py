"""Stage `distill@ARM`: one student, distilled as its arm of params/study.yaml says.

python -m components.distill --arm align_ti
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState

from components.align_ti.step import AlignTI
from components.config.load import load_settings
from components.config.settings import Settings
from components.config.study import Arm
from components.distill.assemble import Job, assemble
from components.distill.card import model_card
from components.distill.checkpoint import Checkpoints
from components.distill.export import export, gathered
from components.distill.launch import launch, needs_launch
from components.distill.loop import train
from components.distill.trainable import choose_trainable, merge_adapters
from components.models.load import Loaded, load
from components.process import exit_from
from components.records.distill import Cost
from components.records.paths import STUDENTS
from components.runtime import peak_memory_mib, prepare_torch
from components.tracking.journal import Run
from components.tracking.stage_run import stage_run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m components.distill", description=__doc__)
    parser.add_argument("--arm", required=True, help="a name under `arms:` in params/study.yaml")
    name = parser.parse_args().arm
    settings = load_settings()
    arm = settings.arm(name)
    if needs_launch(settings.runtime):
        launch(settings.runtime, prepare_torch(settings.runtime, arm.seed).type, sys.argv[1:])
        return
    with stage_run("distill", name, runtime=settings.runtime, params=arm.model_dump(mode="json")) as run:
        cost = distill(name, arm, settings, run)
        run.metrics({"usage/train_seconds": cost.train_seconds, "usage/peak_memory_mib": cost.peak_memory_mib})
    if PartialState().is_main_process:
        print(
            f"distill@{name}: {cost.steps:,} steps in {cost.train_seconds:.0f} s, peak {cost.peak_memory_mib:,.0f} MiB"
            f" -> {STUDENTS / name / 'model'}"
        )
    PartialState().destroy_process_group()


def distill(name: str, arm: Arm, settings: Settings, run: Run) -> Cost:
    """Train and export one arm. Returns its cost."""
    job = assemble(name, arm, settings)
    run.dataset("train", job.samples.manifest.digest[:32])
    is_main = job.accelerator.is_main_process
    with Checkpoints.of(name, job.fingerprint, main=is_main) as checkpoints:
        outcome = train(job, checkpoints, run)
        if count := _equal_weights(job.module, job.accelerator):
            run.metrics({"iva/equal_weights": count})
            job.accelerator.print(f"{job.title}: no attention was left for {count:,} images, whose tokens weighed the same")
        run.metrics(_concentration(job.module, job.accelerator))
        peak = torch.tensor([peak_memory_mib(job.accelerator.device)], device=job.accelerator.device)
        cost = Cost(
            train_seconds=round(outcome.seconds, 3),
            step_seconds=outcome.step_seconds,
            peak_memory_mib=round(float(job.accelerator.gather(peak).max()), 1),  # of the fullest process
            device=str(job.accelerator.device),
            steps=outcome.steps,
        )
        state = gathered(job.accelerator, outcome.wrapped)
        if is_main:
            student = job.student if state is None else _unsharded(job, state)
            if settings.distill.trainable.lora is not None:
                merge_adapters(student.model)
            export(STUDENTS / name, student, job.collator.template, model_card(name, job.facts), outcome.losses, cost)
            checkpoints.clear()
    return cost


def _unsharded(job: Job, state: dict[str, torch.Tensor]) -> Loaded:
    """Student on the CPU with the gathered weights, for runs that shard them over processes."""
    student = load(Path(job.start.path), "cpu")
    choose_trainable(student, job.distill)
    student.model.load_state_dict(state)
    return student


def _equal_weights(module: AlignTI, accelerator: Accelerator) -> int:
    """Number of images with uniform weights for lack of attention, over all processes since process start."""
    teacher = module.live_teacher
    count = torch.zeros((), dtype=torch.long) if teacher is None else teacher.equal_weights
    return int(accelerator.gather(count.to(accelerator.device)[None]).sum())


def _concentration(module: AlignTI, accelerator: Accelerator) -> dict[str, float]:
    """Mean concentration of the weights of L_iva per image, over all processes since process start."""
    names = ("iva/effective_tokens", "iva/top5", "iva/rows", "iva/images")
    sums = torch.tensor([float(module.diagnostics.get(name, 0)) for name in names], device=accelerator.device)
    *means, images = accelerator.reduce(sums, reduction="sum").tolist()
    return {name: mean / images for name, mean in zip(names, means, strict=False) if mean} if images else {}


if __name__ == "__main__":
    exit_from(main)
