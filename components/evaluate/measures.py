"""Measures for comparing arms, each a ratio of two sums over questions; scorers of params/evaluate.yaml come last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.evaluate.metrics import token_f1
from components.evaluate.scorers import SCORERS
from components.records.evaluate import Likelihood, Prediction
from components.report.markdown import signed

EXACT_MATCH = "exact_match"


@dataclass(frozen=True)
class Measure:
    """Title, unit and number format of a measure."""

    title: str
    unit: str  # unit of a difference
    scale: float  # factor from the stored number to the one shown
    digits: int
    lower_is_better: bool = False

    def said(self, value: float) -> str:
        return f"{self.scale * value:.{self.digits}f}"

    def difference(self, value: float) -> str:
        return signed(self.scale * value, self.digits)


MEASURES = {
    EXACT_MATCH: Measure("exact match, %", "points", 100, 1),
    "token_f1": Measure("token F1, %", "points", 100, 1),
    "nats_per_token": Measure("nats per reference token", "nats", 1, 3, lower_is_better=True),
    "kl_per_token": Measure("KL from the teacher, nats per token", "nats", 1, 3, lower_is_better=True),
}
ALWAYS = tuple(MEASURES)
MEASURES |= {name: Measure(f"{scorer.title}, %", "points", 100, 1) for name, scorer in SCORERS.items()}


def per_question(
    measure: str, predictions: Sequence[Prediction], likelihoods: Sequence[Likelihood]
) -> list[tuple[float, float]]:
    """(value, weight) per question of one run. The teacher's KL from itself is 0."""
    if measure == EXACT_MATCH:
        return [(float(p.correct), 1.0) for p in predictions]
    if measure == "token_f1":
        return [(token_f1(p.answer, p.reference), 1.0) for p in predictions]
    if measure in SCORERS:
        return [(SCORERS[measure].worth(p), 1.0) for p in predictions]
    if measure == "nats_per_token":
        return [(one.nats, one.tokens) for one in likelihoods]
    return [(one.kl or 0.0, one.tokens) for one in likelihoods]
