"""Cost of each arm's training step against `kd`: `python -m benchmarks.methods`, after `alignti study expand field` and
`dvc repro search_layer cache_teacher write_answers`.

Arms are those of params/study.yaml of one seed, each as `distill` assembles it, on its first batch: collation, generated
answers, passes, losses, backward, clipping, AdamW. Rates are 0, so that every round of an arm does the same work. Arms on the
teacher's cache (`teacher_signals: {source: cache}`) are measured with a live teacher too.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from benchmarks import measure, table
from components.align_ti.step import total
from components.config.load import load_settings
from components.config.settings import Settings
from components.config.study import Arm
from components.distill.assemble import assemble
from components.distill.loader import Steps, batches
from components.errors import InputError
from components.process import exit_from

KD = "kd"
LIVE = ", live teacher"
ROUNDS = 9


def step_of(name: str, settings: Settings) -> measure.Work:
    """One optimiser step of the arm."""
    job = assemble(name, settings.arm(name), settings)
    data = Steps(job.samples, job.collator, job.order, job.distill, 0, 1, job.rollouts, job.answers, job.evidence)
    weights = job.module.method.weight_vector()
    parameters = [p for p in job.module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    job.module.train()

    def step() -> None:
        for batch, keys in next(batches(data, 0, 1, loaders=0)):
            terms = job.module(batch, keys)
            total(terms.sums, terms.counts, weights).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, job.distill.optimiser.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()

    return step


def run(settings: Settings, seed: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step of each arm of `seed`, and their ratios to `kd`'s."""
    if torch.cuda.is_available():
        raise InputError("costs are CPU time: run it on a machine without a GPU")
    names = {name.removesuffix(f"-seed{seed}"): name for name, arm in settings.study.arms.items() if arm.seed == seed}
    if KD not in names:
        raise InputError(f"params/study.yaml has no arm {KD} of seed {seed}: `alignti study expand field` first")
    arms = {name: step_of(names[name], settings) for name in tqdm(names, desc="methods: arms", unit="arm")}
    cached = [name for name, arm in names.items() if settings.uses_cache(settings.arm(arm)) and _has_teacher(settings.arm(arm))]
    signals = settings.distill.teacher_signals.model_copy(update={"source": "live"})
    live = settings.model_copy(update={"distill": settings.distill.model_copy(update={"teacher_signals": signals})})
    arms |= {f"{name}{LIVE}": step_of(names[name], live) for name in cached}
    for step in arms.values():
        step()
    cpu, distill = torch.device("cpu"), settings.distill
    ratios = {name: (name, KD) for name in arms if name != KD}
    ratios |= {f"{name} / live": (name, f"{name}{LIVE}") for name in cached}
    timed = measure.compare_arms(arms, rounds, cpu, "methods", ratios, samples=distill.batch_size)
    for name, arm in timed["arms"].items():
        arm["of_kd"] = timed["ratios"].get(name, 1.0)
    about = f"a step of {distill.batch_size} samples of this folder's data, at the start of the training"
    return measure.result("methods", settings.data.source, about, cpu) | timed


def _has_teacher(arm: Arm) -> bool:
    return any(needs.teacher for needs in arm.needs.values())


def main() -> None:
    parser = table.arguments("methods", __doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    measure.prepare()
    print(table.report(run(load_settings(), args.seed, args.rounds), args.json))


if __name__ == "__main__":
    exit_from(main)
