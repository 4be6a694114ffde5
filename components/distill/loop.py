"""The training loop: global batches, global denominators, clipping, cosine schedule, checkpoints, resume."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from components.align_ti.losses import TERMS, total
from components.align_ti.step import AlignTI, Terms
from components.distill.checkpoint import Checkpoints
from components.distill.memory import explained
from components.distill.order import Order
from components.distill.replay import Origin
from components.errors import AlignTIError, InputError, Interrupted
from components.models.collate import Batch, Collator
from components.settings import DistillSettings
from components.shards import Samples
from components.tracking import Run


@dataclass(frozen=True)
class Outcome:
    losses: list[dict[str, float]]  # one per `log_every` steps
    seconds: float  # of training, over all the times it was resumed
    steps: int


def train(
    module: AlignTI,
    samples: Samples,
    collator: Collator,
    order: Order,
    settings: DistillSettings,
    accelerator: Accelerator,
    checkpoints: Checkpoints,
    run: Run,
    title: str,
    origin: Origin,
) -> Outcome:
    """Train `module`'s student for `settings.steps` steps, from the latest checkpoint if there is one.

    Raises:
        InputError: batch_size does not divide over the ranks.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was written first.
        OutOfMemory: a step does not fit; names the largest part and the setting that lowers it.
        AlignTIError: the loss is not finite; names step, term, samples and the dump for `alignti replay`.
    """
    micro_batches = _micro_batches_per_step(settings, accelerator.num_processes)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters,
        lr=settings.optimiser.learning_rate,
        betas=settings.optimiser.betas,
        weight_decay=settings.optimiser.weight_decay,
    )
    warmup = round(settings.steps * settings.optimiser.warmup_ratio)
    schedule = get_cosine_schedule_with_warmup(optimiser, warmup, settings.steps)
    wrapped, optimiser = accelerator.prepare(module, optimiser)
    accelerator.register_for_checkpointing(schedule)
    weights = torch.tensor([module.method.weights[term] for term in TERMS], device=accelerator.device)

    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "losses": []}
    if latest := checkpoints.latest():
        progress = checkpoints.restore(accelerator, latest)
        accelerator.print(f"{title}: resumed at step {progress['step']:,} of {settings.steps:,}")
    stream = _batches(samples, collator, order, settings, progress["step"], accelerator)
    bar = tqdm(total=settings.steps, initial=progress["step"], desc=title, unit="step", disable=not accelerator.is_main_process)
    started = time.perf_counter() - progress["seconds"]
    wrapped.train()
    with bar, _stop_request() as stop:
        for step in range(progress["step"] + 1, settings.steps + 1):
            batches = [next(stream) for _ in range(micro_batches)]
            with explained(module, batches, settings):
                terms, norm, left_out = _step(wrapped, module, batches, weights, optimiser, settings, accelerator)
            record = dict(zip(TERMS, terms.tolist(), strict=True))
            if not all(map(math.isfinite, [*record.values(), norm])):
                state = accelerator.get_state_dict(wrapped)
                dump = origin.dump(step, module, state, batches, {**record, "gradient norm": norm}, accelerator)
                raise _not_finite(step, record, norm, [id_ for batch, _ in batches for id_ in batch.ids], dump)
            schedule.step()
            record["total"] = float((weights.cpu() * torch.tensor(list(record.values()))).sum())
            bar.update()
            if step % settings.log_every == 0 or step == settings.steps:
                bar.set_postfix({name: f"{record[name]:.3f}" for name in (*TERMS, "total") if record[name]})
                line = {"step": step, **record, "grad_norm": norm, "lr": schedule.get_last_lr()[0]}
                if module.method.max_expanded_length is not None:
                    line["tpa_steps_left_out"] = left_out
                progress["losses"].append(line)
                run.metrics({f"loss/{key}": value for key, value in line.items() if key != "step"}, step=step)
            progress |= {"step": step, "seconds": time.perf_counter() - started}
            if stop or (step % settings.checkpoint_every == 0 and step < settings.steps):
                checkpoints.save(accelerator, progress)
            if stop:
                raise Interrupted(f"{title} stopped at step {step:,}, saved; run the same command to go on")
    return Outcome(progress["losses"], progress["seconds"], settings.steps)


def _step(
    wrapped: torch.nn.Module,
    module: AlignTI,
    batches: list[tuple[Batch, list[int]]],
    weights: Tensor,
    optimiser: torch.optim.Optimizer,
    settings: DistillSettings,
    accelerator: Accelerator,
) -> tuple[Tensor, float, int]:
    """One optimiser step over the micro-batches of this rank. Returns each term's global mean (4,), the gradient norm, and
    how many response steps of the global batch a cap on the length left without alternatives.

    Where a mean or the norm is not finite the weights stay as they were.

    Denominators are counts over the global batch. With one micro-batch they come out of the same pass; with several, how
    many draws count has to be known before the first backward pass, so the draws are made first.
    """
    draws: list[Tensor | None] = [None] * len(batches)
    counts: Tensor | None = None
    if len(batches) > 1:
        if module.method.wants("tpa"):
            draws = [module.draw(batch, keys) for batch, keys in batches]
        mine = sum((module.count(batch, drawn) for (batch, _), drawn in zip(batches, draws, strict=True)), weights * 0)
        counts = accelerator.reduce(mine, reduction="sum")
    sums = torch.zeros_like(weights)
    left_out = torch.zeros_like(weights[:1])
    for i, ((batch, keys), drawn) in enumerate(zip(batches, draws, strict=True)):
        last = i == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(wrapped), accelerator.autocast():
            terms: Terms = wrapped(batch, keys, drawn)
            if counts is None:
                counts = accelerator.reduce(terms.counts, reduction="sum")
            # Data parallelism averages gradients over ranks; the denominators are global already.
            loss = total(terms.sums, counts, weights) * accelerator.num_processes
            accelerator.backward(loss)
        sums += terms.sums.detach()
        left_out += terms.steps_left_out
    norm = float(accelerator.clip_grad_norm_(wrapped.parameters(), settings.optimiser.max_grad_norm))
    assert counts is not None
    reduced = accelerator.reduce(torch.cat([sums, left_out]), reduction="sum")
    means = reduced[:-1] / counts.clamp_min(1)
    if math.isfinite(norm) and bool(means.isfinite().all()):
        optimiser.step()
    optimiser.zero_grad()
    return means, norm, int(reduced[-1])


def _batches(
    samples: Samples,
    collator: Collator,
    order: Order,
    settings: DistillSettings,
    first_step: int,
    accelerator: Accelerator,
) -> Iterator[tuple[Batch, list[int]]]:
    """Collated micro-batches of this rank with the keys of their samples."""
    for micro in order.micro_batches(
        first_step, settings.steps, settings.micro_batch_size, accelerator.process_index, accelerator.num_processes
    ):
        keys = [order.seed * 2**40 + key for key, _ in micro]
        yield collator([samples[index] for _, index in micro]).to(accelerator.device), keys


def _micro_batches_per_step(settings: DistillSettings, ranks: int) -> int:
    per_pass = settings.micro_batch_size * ranks
    if settings.batch_size % per_pass:
        raise InputError(
            f"params/distill.yaml: batch_size {settings.batch_size} is not a multiple of micro_batch_size"
            f" {settings.micro_batch_size} x {ranks} processes"
        )
    return settings.batch_size // per_pass


def _not_finite(step: int, record: dict[str, float], norm: float, ids: list[str], dump: Path) -> AlignTIError:
    bad = [name for name, value in {**record, "gradient norm": norm}.items() if not math.isfinite(value)]
    return AlignTIError(
        f"step {step:,}: {', '.join(bad)} is not finite; `alignti replay {dump}` says which sample's. Lower"
        f" optimiser.learning_rate in params/distill.yaml, or look at the samples of this batch: {', '.join(ids)}"
    )


class _Flag:
    def __init__(self) -> None:
        self.up = False

    def __bool__(self) -> bool:
        return self.up


@contextmanager
def _stop_request() -> Iterator[_Flag]:
    """While open, SIGTERM and SIGINT raise a flag that the loop reads between steps, where state is whole."""
    flag = _Flag()

    def ask(_signum: int, _frame: object) -> None:
        flag.up = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
