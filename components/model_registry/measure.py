"""Scores of an earlier student on today's questions."""

from __future__ import annotations

from pathlib import Path

from components.config.settings import Settings
from components.dataset.shards import Samples
from components.evaluate import fingerprint, generate, metrics
from components.models.load import load
from components.models.template import Template
from components.records.evaluate import Fingerprint, Prediction
from components.records.paths import DATASET, ROWS
from components.runtime import prepare_torch


def answers(model: Path, title: str, settings: Settings) -> tuple[list[Prediction], Fingerprint]:
    """Predictions of the checkpoint `model` on the split that `evaluate` scores, and the fingerprint of the measurement."""
    samples = Samples(DATASET, settings.evaluate.split, ROWS)
    rows = generate.questions(samples)
    loaded, template = load(model, prepare_torch(settings.runtime, seed=0)), Template.from_settings(settings.models.template)
    generated = generate.answers(loaded, samples, rows, template, settings.models.max_length, settings.evaluate, title)
    measurement = fingerprint.for_evaluate(loaded, samples, rows, template, settings.evaluate)
    return metrics.predictions((samples[row] for row in rows), generated), measurement
