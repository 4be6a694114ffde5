"""Training loop of the embedded family: AdamW, warm-up, cosine, clipping, a progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from tqdm import trange
from transformers import get_cosine_schedule_with_warmup

from components.config.models import Training
from components.errors import AlignTIError

Log = Callable[[str, float, int], None]  # (name, loss, step)
LOG_EVERY = 20


def fit(parameters: Iterable[Tensor], loss_at: Callable[[int], Tensor], training: Training, name: str, log: Log) -> None:
    """Minimise `loss_at(step)` over `parameters`; `log` gets the mean loss of every `LOG_EVERY` steps.

    Weight decay on matrices alone. Raises AlignTIError, naming the step, if the loss is not finite.
    """
    optimiser_settings = training.optimiser
    trainable = list(parameters)
    matrices, vectors = [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimiser_settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optimiser_settings.learning_rate,
        betas=optimiser_settings.betas,
    )
    warmup = round(training.steps * optimiser_settings.warmup_ratio)
    schedule = get_cosine_schedule_with_warmup(optimiser, warmup, training.steps)
    recent: list[float] = []
    with trange(1, training.steps + 1, desc=name, unit="step") as bar:
        for step in bar:
            loss = loss_at(step)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trainable, optimiser_settings.max_grad_norm)
            optimiser.step()
            schedule.step()
            recent.append(loss.item())
            if not math.isfinite(recent[-1]):
                raise AlignTIError(f"{name}: the loss is {recent[-1]} at step {step}; lower its learning_rate")
            if step % LOG_EVERY == 0 or step == training.steps:
                mean = sum(recent) / len(recent)
                recent.clear()
                bar.set_postfix(loss=f"{mean:.3f}")
                log(name, mean, step)


def epochs(count: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of indices below `count`, reshuffled each epoch."""
    pending: list[int] = []
    while True:
        while len(pending) < batch_size:
            pending += torch.randperm(count, generator=generator).tolist()
        yield pending[:batch_size]
        del pending[:batch_size]
