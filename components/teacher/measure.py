"""Quality and cost of one teacher candidate, on validation samples."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from components.config.settings import Settings
from components.dataset.shards import Samples
from components.evaluate import generate, likelihood, metrics
from components.evaluate.memory import peak_mib
from components.irs import search
from components.models.load import load
from components.models.template import Template
from components.records.models import ModelRecord
from components.records.teacher import Candidate
from components.teacher.choose import limits_broken


def balanced(rows: Sequence[int], kinds: Sequence[str], size: int, seed: int) -> list[int]:
    """Subset of `size` rows, sorted, drawn round-robin over the kinds `kinds[row]`; all rows if there are fewer."""
    rng = random.Random(seed)
    pools: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        pools[kinds[row]].append(row)
    for kind in sorted(pools):
        rng.shuffle(pools[kind])
    turns = sorted((turn, kind) for kind, pool in pools.items() for turn in range(len(pool)))
    return sorted(pools[kind][turn] for turn, kind in turns[:size])


def measure(record: ModelRecord, samples: Samples, rows: Sequence[int], settings: Settings, device: torch.device) -> Candidate:
    """Metrics of one candidate over `samples[row] for row in rows`.

    memory_mib: weights plus peak allocation during one batch of `evaluate.batch_size` samples.
    seconds_per_1000: wall time of generation, with image decoding and tokenisation; the memory batch is the warmup.
    irs: IRS of the best layer, over `irs.images` images of the same split; None if these have too few instructions and no arm
        weights visual tokens by IRS.
    """
    loaded = load(Path(record.path), device)
    template = Template.from_settings(settings.models.template)

    def answer(batch: Sequence[int], title: str) -> list[str]:
        return generate.answers(loaded, samples, batch, template, settings.models.max_length, settings.evaluate, title)

    memory_mib = peak_mib(loaded.model, lambda: answer(rows[: settings.evaluate.batch_size], f"{record.name}: memory"))
    start = time.perf_counter()
    answers = answer(rows, f"{record.name}: answers")
    seconds = time.perf_counter() - start
    scores = metrics.score(record.name, metrics.predictions((samples[row] for row in rows), answers))
    likelihoods = likelihood.likelihoods(
        loaded, samples, rows, template, settings.evaluate.batch_size, f"{record.name}: references"
    )
    try:
        ranking = search.measure(loaded, samples, template, settings.irs)  # last: switches the model's attention function
    except search.TooFewInstructions:
        if settings.needs_layer:
            raise
        ranking = None
    candidate = Candidate(
        name=record.name,
        exact_match=scores.exact_match,
        per_kind=scores.per_kind,
        nats_per_token=likelihood.nats_per_token(likelihoods),
        irs=None if ranking is None else ranking.irs[ranking.layer],
        irs_layer=None if ranking is None else ranking.layer,
        parameters=record.parameters,
        seconds_per_1000=1000 * seconds / len(rows),
        memory_mib=memory_mib,
        refused=[],
    )
    return candidate.model_copy(update={"refused": limits_broken(candidate, settings.teacher)})
