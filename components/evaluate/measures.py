"""Measures for comparing arms, each a ratio of two sums over questions; scorers of params/evaluate.yaml come last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from components.evaluate.metrics import token_f1
from components.evaluate.scorers import SCORERS, Scorer
from components.records.evaluate import Likelihood, Prediction
from components.report.markdown import signed

EXACT_MATCH = "exact_match"


@dataclass(frozen=True)
class Measure:
    """Title, unit and number format of a measure, and the terms of its two sums."""

    title: str
    unit: str  # unit of a difference
    scale: float  # factor from the stored number to the one shown
    digits: int
    terms: Callable[[Prediction, Likelihood], tuple[float, float]]  # value and weight of one question
    lower_is_better: bool = False

    def format(self, value: float) -> str:
        return f"{self.scale * value:.{self.digits}f}"

    def format_difference(self, value: float) -> str:
        return signed(self.scale * value, self.digits)


def _scorer_measure(scorer: Scorer) -> Measure:
    return Measure(f"{scorer.title}, %", "points", 100, 1, lambda p, _: (scorer.score(p), 1))


MEASURES = {
    EXACT_MATCH: Measure("exact match, %", "points", 100, 1, lambda p, _: (p.correct, 1)),
    "token_f1": Measure("token F1, %", "points", 100, 1, lambda p, _: (token_f1(p.answer, p.reference), 1)),
    "nats_per_token": Measure(
        "nats per reference token", "nats", 1, 3, lambda _, ref: (ref.nats, ref.tokens), lower_is_better=True
    ),
    "kl_per_token": Measure(
        "KL from the teacher, nats per token", "nats", 1, 3, lambda _, ref: (ref.kl or 0, ref.tokens), lower_is_better=True
    ),  # of the teacher from itself: 0
}
DEFAULT_MEASURES = tuple(MEASURES)
MEASURES |= {name: _scorer_measure(scorer) for name, scorer in SCORERS.items()}
