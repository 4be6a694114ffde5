"""Paired test of two students on the same questions.

The report's test (components/evaluate/statistics.py): a paired bootstrap over images, at the confidence of
params/evaluate.yaml.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from components.config.evaluate import EvaluateSettings
from components.errors import DataError
from components.evaluate.fingerprint import differences
from components.evaluate.metrics import normalise
from components.evaluate.statistics import bootstrap, interval, p_value
from components.records.compare import Difference
from components.records.evaluate import Fingerprint, Prediction


class MeasuredDifferently(DataError):
    """Scores with different fingerprints, which are not comparable."""


def majority_accuracy(answers: Sequence[Prediction]) -> float:
    """Majority baseline, which any champion must beat: accuracy of the most frequent reference of each question's kind."""
    references: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        references[answer.kind][normalise(answer.reference)] += 1
    return sum(counts.most_common(1)[0][1] for counts in references.values()) / len(answers)


def paired_test(
    names: tuple[str, str],
    answers: tuple[Sequence[Prediction], Sequence[Prediction]],
    fingerprints: tuple[Fingerprint | None, Fingerprint | None],
    settings: EvaluateSettings,
) -> Difference:
    """First student minus second; `larger_than_noise` and positive: the first is better.

    Raises:
        MeasuredDifferently: the fingerprints differ; names the differences.
        DataError: equal fingerprints, different questions.
    """
    if differs := differences(*fingerprints):
        raise MeasuredDifferently(f"{names[0]} and {names[1]} were measured differently ({'; '.join(differs)})")
    first, second = ({p.id: p for p in predictions} for predictions in answers)
    if first.keys() != second.keys() or any(first[key].reference != second[key].reference for key in first):
        raise DataError(f"the answers of {names[0]} and {names[1]} are to different questions, though their fingerprints agree")
    question_ids = list(first)
    observed, resampled = bootstrap(
        values=[[side[key].correct for key in question_ids] for side in (first, second)],
        images=[first[key].image_id for key in question_ids],
        kinds=[first[key].kind for key in question_ids],
        resamples=settings.bootstrap_resamples,
        seed=settings.seed,
    )
    draws = resampled.overall[:, 0] - resampled.overall[:, 1]
    p = p_value(draws)
    return Difference(
        arm=names[0],
        against=names[1],
        difference=float(observed.overall[0] - observed.overall[1]),
        ci95=interval(draws, settings.confidence),
        p_value=p,
        p_holm=p,  # a single test
    )
