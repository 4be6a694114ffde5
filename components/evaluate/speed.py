"""Generation speed of every model, measured in one run on the same questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from components.config.settings import Settings
from components.dataset.shards import Samples
from components.errors import DataError
from components.evaluate import generate
from components.evaluate.memory import peak_mib
from components.io import sha256
from components.models.load import Loaded, load
from components.models.template import Template
from components.records.paths import DATASET, REPORTS, ROWS
from components.records.record import Record

SPEED = REPORTS / "speed.json"
SINGLE_QUESTIONS = 20  # questions answered one at a time, for the time to the first token


class Speed(Record):
    """Generation speed of one model on one device."""

    model: str  # sha256 over its folder
    device: str
    tokens_per_second: float  # generated, over one batch of evaluate.batch_size, image encoding and prefill included
    first_token_ms: float  # median over single questions
    memory_mib: float  # peak for this batch, weights included
    parameters: int


class SpeedReport(Record):
    """reports/speed.json"""

    questions: int
    models: dict[str, Speed]


def read(current: Callable[[str], str | None]) -> SpeedReport | None:
    """Earlier speeds, without those of changed models; None if nothing was measured. `current`: arm -> hash of its model."""
    try:
        report = SpeedReport.read(SPEED)
    except DataError:  # none, or one of another version
        return None
    return report.model_copy(update={"models": {a: speed for a, speed in report.models.items() if current(a) == speed.model}})


def measure(models: Iterable[tuple[str, Path]], settings: Settings, device: torch.device) -> SpeedReport:
    """Speed of each model on the first `evaluate.batch_size` questions of the evaluated split, after one warm-up question."""
    samples = Samples(DATASET, settings.evaluate.split, ROWS)
    rows = generate.questions(samples)[: settings.evaluate.batch_size]
    speeds = {}
    for name, path in tqdm(list(models), desc="speed", unit="model"):
        speeds[name] = _measure_model(load(path, device), sha256([path]), samples, rows, settings)
    return SpeedReport(questions=len(rows), models=speeds)


def _measure_model(loaded: Loaded, model: str, samples: Samples, rows: Sequence[int], settings: Settings) -> Speed:
    template = Template.from_settings(settings.models.template)
    device = loaded.model.device

    def answers(batch_rows: Sequence[int], tokens: int) -> tuple[list[str], float]:
        evaluate_settings = settings.evaluate.model_copy(update={"max_new_tokens": tokens})
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        texts = generate.answers(loaded, samples, batch_rows, template, settings.models.max_length, evaluate_settings, "")
        return texts, time.perf_counter() - start

    answers(rows[:1], 1)
    texts, seconds = answers(rows, settings.evaluate.max_new_tokens)
    token_ids = loaded.processor.tokenizer(texts, add_special_tokens=False).input_ids
    return Speed(
        model=model,
        device=device.type,
        tokens_per_second=sum(len(tokens) + 1 for tokens in token_ids) / seconds,  # plus the EOS of each answer
        first_token_ms=1000 * median(answers([row], 1)[1] for row in rows[:SINGLE_QUESTIONS]),
        memory_mib=peak_mib(loaded.model, lambda: answers(rows, settings.evaluate.max_new_tokens)),
        parameters=sum(p.numel() for p in loaded.model.parameters()),
    )
