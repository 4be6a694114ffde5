"""Training loop: global batches, global denominators, gradient clipping, cosine schedule, checkpoints, resume."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from components.align_ti.batch import Batch
from components.align_ti.step import Method, total
from components.distill.assemble import Job
from components.distill.checkpoint import Checkpoints
from components.distill.ddp_module import Replica
from components.distill.launch import prepare_sharding
from components.distill.loader import Steps, batches, worker_errors
from components.distill.memory import memory_errors
from components.distill.replay import dump
from components.distill.trainable import learning_rates, parameter_groups, term_parameter_groups
from components.errors import AlignTIError, Interrupted
from components.process import endings
from components.tracking.journal import Run


@dataclass(frozen=True)
class Outcome:
    losses: list[dict[str, float]]  # one record per `log_every` steps
    seconds: float  # training time, summed over resumed runs
    step_seconds: float  # median time of a step
    steps: int
    wrapped: torch.nn.Module  # module prepared by accelerate


def train(job: Job, checkpoints: Checkpoints, run: Run) -> Outcome:
    """Train the job's student for `steps` steps, resuming from the latest checkpoint if there is one.

    Raises:
        InputError: batch_size does not divide over the ranks; the checkpoint has another layout.
        Interrupted: SIGTERM, SIGHUP or SIGINT arrived; a checkpoint was saved first.
        OutOfMemory: a step does not fit; names the largest part and the setting that lowers it.
        TryAgainError: a loader worker died.
        AlignTIError: loss or gradient norm is not finite; names step, term, samples and the dump for `alignti replay`.
    """
    module, settings, accelerator, title = job.module, job.distill, job.accelerator, job.title
    lora = settings.trainable.lora
    replica = Replica(module, accelerator.num_processes, seeded=lora is not None and lora.dropout > 0)
    optimiser = torch.optim.AdamW(
        [*parameter_groups(module.student.model, settings), *term_parameter_groups(module, settings)],
        betas=settings.optimiser.betas,
        weight_decay=settings.optimiser.weight_decay,
    )
    warmup = min(round(settings.steps * settings.optimiser.warmup_ratio), settings.steps - 1)  # its first step has rate 0
    schedule = get_cosine_schedule_with_warmup(optimiser, warmup, settings.steps)
    prepare_sharding(accelerator, module, settings)
    wrapped, optimiser = accelerator.prepare(replica, optimiser)
    accelerator.register_for_checkpointing(schedule)
    weights = module.method.weight_vector(accelerator.device)

    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "step_seconds": [], "losses": []}
    if latest := checkpoints.latest():
        progress = checkpoints.restore(accelerator, latest)
        accelerator.print(f"{title}: resumed at step {progress['step']:,} of {settings.steps:,}", flush=True)
    rank_and_ranks = accelerator.process_index, accelerator.num_processes
    steps = Steps(job.samples, job.collator, job.order, settings, *rank_and_ranks, job.rollouts, job.answers, job.evidence)
    loaders = job.settings.runtime.loaders
    if job.rollouts is not None:
        loaders = 0  # rollouts need the student of this process
        job.rollouts.cached_answers = progress.setdefault("rollouts", {})
    stream = batches(steps, progress["step"], settings.steps, loaders)
    bar = tqdm(total=settings.steps, initial=progress["step"], desc=title, unit="step", disable=not accelerator.is_main_process)
    started = time.perf_counter() - progress["seconds"]
    wrapped.train()
    with bar, worker_errors(), _stop_requests() as stop_signals:
        for step in range(progress["step"] + 1, settings.steps + 1):
            micro_batches = [(batch.to(accelerator.device), keys) for batch, keys in next(stream)]
            module.progress = (step - 1) / settings.steps
            with memory_errors(module, micro_batches, settings):
                terms, norm, left_out, stopping = _step(job, wrapped, optimiser, micro_batches, weights, stop_signals)
            record = dict(zip(module.method.terms, terms.tolist(), strict=True))
            values = {**record, "gradient norm": norm}
            if not all(map(math.isfinite, values.values())):
                state = {name.removeprefix("method."): tensor for name, tensor in accelerator.get_state_dict(wrapped).items()}
                folder = dump(job, step, state, micro_batches, values)
                raise _not_finite(step, values, [id_ for batch, _ in micro_batches for id_ in batch.ids], folder)
            rates = learning_rates(optimiser)  # those of this step
            schedule.step()
            module.stepped(terms)
            record["total"] = float((weights.cpu() * torch.tensor(list(record.values()))).sum())
            bar.update()
            if step % settings.log_every == 0 or step == settings.steps:
                bar.set_postfix({name: f"{record[name]:.3f}" for name in record if record[name]})
                entry = {"step": step, **record, "grad_norm": norm, **rates}
                if module.method.max_expanded_length is not None:
                    entry["tpa_steps_left_out"] = left_out
                progress["losses"].append(entry)
                rollouts = job.rollouts.metrics() if job.rollouts else {}
                run.metrics(_metrics(entry, module.method) | rollouts, step)
            seconds = time.perf_counter() - started
            progress["step_seconds"].append(round(seconds - progress["seconds"], 4))
            progress |= {"step": step, "seconds": seconds}
            if stopping or (step % settings.checkpoint_every == 0 and step < settings.steps):
                checkpoints.save(accelerator, progress)
            if stopping:
                raise Interrupted(f"{title} stopped at step {step:,}, saved; run the same command to go on")
    return Outcome(progress["losses"], progress["seconds"], median(progress["step_seconds"]), settings.steps, wrapped)


def _step(
    job: Job,
    wrapped: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: list[tuple[Batch, list[int]]],
    weights: Tensor,
    stop_signals: list[int],
) -> tuple[Tensor, float, int, bool]:
    """One optimiser step over the micro-batches of this rank, with gradient accumulation.

    Returns each term's global mean, the gradient norm, the number of response steps of the global batch beyond the cap on the
    length, and the stop request of any rank. A mean or norm that is not finite skips the optimiser step.

    Denominators are counts over the global batch. One micro-batch yields them in its own pass; with several, the draws that
    count must be known before the first backward pass, so sampling comes first.
    """
    module, accelerator = job.module, job.accelerator
    draws: list[Tensor | None] = [None] * len(batches)
    counts: Tensor | None = None
    if len(batches) > 1:
        if module.method.needs.ribbon:
            with torch.no_grad(), accelerator.autocast():
                draws = [wrapped(batch, keys, only_draw=True)[0] for batch, keys in batches]
        local_counts = sum((module.count(batch, drawn) for (batch, _), drawn in zip(batches, draws, strict=True)), weights * 0)
        counts = accelerator.reduce(local_counts, reduction="sum")
    sums = torch.zeros_like(weights)
    left_out = torch.zeros_like(weights[:1])
    for i, ((batch, keys), drawn) in enumerate(zip(batches, draws, strict=True)):
        last = i == len(batches) - 1
        accelerator.gradient_state._set_sync_gradients(last)  # read by DeepSpeed
        with nullcontext() if last else accelerator.no_sync(wrapped), accelerator.autocast():
            batch_sums, batch_counts, batch_left_out = wrapped(batch, keys, drawn)
            if counts is None:
                counts = accelerator.reduce(batch_counts, reduction="sum")
            # Data parallelism averages gradients over ranks, but the denominators are already global.
            loss = total(batch_sums, counts, weights) * accelerator.num_processes
            accelerator.backward(loss)
        sums += batch_sums.detach()
        left_out += batch_left_out
    norm = float(accelerator.clip_grad_norm_(wrapped.parameters(), job.distill.optimiser.max_grad_norm))
    assert counts is not None
    local_sums = torch.cat([sums, left_out, sums.new_tensor([bool(stop_signals)])])
    *_, all_left_out, stop_requested = reduced = accelerator.reduce(local_sums, reduction="sum")
    means = reduced[:-2] / counts.clamp_min(1)
    if math.isfinite(norm) and bool(means.isfinite().all()):
        optimiser.step()
    optimiser.zero_grad()
    return means, norm, int(all_left_out), bool(stop_requested)


def _metrics(entry: dict[str, float], method: Method) -> dict[str, float]:
    """Metrics of a record of losses.jsonl: `loss/` for the total and trained terms, `optim/` for the rest."""
    losses = {"total", *method.weighted_terms}
    optimiser_keys = entry.keys() - {"step", "total", *method.terms}
    return {f"loss/{key}": entry[key] for key in losses} | {f"optim/{key}": entry[key] for key in optimiser_keys}


def _not_finite(step: int, values: dict[str, float], ids: list[str], dumped: Path) -> AlignTIError:
    names = [name for name, value in values.items() if not math.isfinite(value)]
    return AlignTIError(
        f"step {step:,}: {', '.join(names)} is not finite; `alignti replay {dumped}` says which sample's. Lower"
        f" optimiser.learning_rate in params/distill.yaml, or look at the samples of this batch: {', '.join(ids)}"
    )


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Signals SIGTERM, SIGHUP and SIGINT received so far, read by the loop between steps, where state is consistent."""
    received: list[int] = []

    def receive(signum: int, _frame: object) -> None:
        received.append(signum)

    previous_handlers = {number: signal.signal(number, receive) for number in (*endings(), signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
