"""Comparison of a study's runs: variants over seeds, tests against baselines, effects of factors.

Seeds are the repetitions: two variants are compared by a paired t test over the seeds that both have, and all p values of a
family are adjusted together (Holm). A factor's main effect is the mean difference over all pairs of runs that agree in
everything else, seed included.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from components.errors import DataError
from components.evaluate.statistics import Interval, holm
from components.study.expand import SEED, Family
from components.study.runs import HOURS, MEMORY, SCORE, Run

GPU_WH, CPU_WH = "cost/gpu_wh", "cost/cpu_wh"
ALPHA = 0.05  # significance level after Holm
ROUNDING = 1e-9  # differences of scores that differ by less are equal
SLACK = 0.05  # relative difference of hours that counts as equal cost: the variation of one run's time


@dataclass(frozen=True)
class Estimate:
    """Mean over `n` values with its t interval; no interval for a single value."""

    mean: float
    interval: Interval | None
    n: int


@dataclass(frozen=True)
class Test:
    """Paired t test of `variant` minus `against`, over the seeds that both have."""

    variant: str
    against: str
    difference: Estimate
    p_value: float | None  # None: fewer than two seeds, or equal differences
    p_holm: float | None

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < ALPHA


@dataclass(frozen=True)
class Effect:
    """Main effect of `factor` at `level` instead of `reference`, all else equal."""

    factor: str
    level: str
    reference: str
    effect: Estimate


@dataclass(frozen=True)
class Variant:
    name: str
    score: Estimate
    hours: float  # mean
    memory_mib: float  # mean
    gpu_wh: float | None  # mean; None unless measured in all runs
    cpu_wh: float | None
    best_at_its_cost: bool  # on the Pareto front of score and hours


@dataclass(frozen=True)
class StudyResult:
    study: str
    runs: list[Run]
    missing: list[str]  # cells of the study without a run
    superseded: int  # runs left out: older ones of the same cells, or of other cells
    variants: list[Variant]  # best first
    tests: dict[str, list[Test]]  # by family
    effects: list[Effect]
    factors: list[str]


def compare(
    study: str, runs: Sequence[Run], cells: Sequence[str], families: Mapping[str, Family], confidence: float
) -> StudyResult:
    """Result of a study over `cells`, the study's arms; the latest of `runs` counts for each.

    Raises:
        DataError: there are no runs, two have the same variant and seed, or their recipes or fingerprints differ, or the latter
            are unknown.
    """
    latest = {run.cell: run for run in sorted(runs, key=lambda run: run.started) if run.cell in set(cells)}
    if not latest:
        others = f" ({abbreviate([run.cell for run in runs])} are of another)" if runs else ""
        raise DataError(f"no cell of study {study} has been run{others}; `alignti study run {study}` runs them")
    chosen = [latest[cell] for cell in cells if cell in latest]
    _check_recipes(chosen)
    check_fingerprints(chosen)
    by_variant: dict[str, list[Run]] = defaultdict(list)
    for run in chosen:
        if twin := next((r for r in by_variant[run.variant] if r.seed == run.seed), None):
            raise DataError(f"{twin.cell} and {run.cell} have one variant, {run.variant}, and one seed, {run.seed or 'none'}")
        by_variant[run.variant].append(run)
    params = dict.fromkeys(path for run in chosen for path in run.params if path != SEED)
    factors = [path for path in params if len({run.params.get(path) for run in chosen}) > 1]
    return StudyResult(
        study=study,
        runs=chosen,
        missing=[cell for cell in cells if cell not in latest],
        superseded=len(runs) - len(chosen),
        variants=_variants(by_variant, confidence),
        tests={
            name: family_tests for name, family in families.items() if (family_tests := _tests(family, by_variant, confidence))
        },
        effects=[effect for factor in factors for effect in _effects(factor, chosen, confidence)],
        factors=factors,
    )


def _check_recipes(runs: Sequence[Run]) -> None:
    """Raises DataError if two runs have different recipes, and thereby another teacher or other rows; names cells of both."""
    cells: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        cells[run.recipe].append(run.cell)
    cells.pop("", None)
    if len(cells) > 1:
        groups = " against ".join(f"{abbreviate(names)} ({recipe})" for recipe, names in cells.items())
        raise DataError(f"arms of different recipes are not compared: {groups}; run the study again, the whole of it under one")


def check_fingerprints(runs: Sequence[Run]) -> None:
    """Raises DataError unless all runs have one known fingerprint; the message names cells and differing fields."""
    groups: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        groups[run.fingerprint].append(run.cell)
    if "null" in groups:
        raise DataError(
            f"how {abbreviate(groups['null'])} was measured is not known (no evaluation fingerprint): the scores are not"
            " compared; run the study again"
        )
    if len(groups) > 1:
        (first_print, first_cells), (second_print, second_cells) = sorted(groups.items(), key=lambda group: -len(group[1]))[:2]
        first_fields, second_fields = json.loads(first_print), json.loads(second_print)
        differing = "; ".join(
            f"{k}: {first_fields.get(k)} and {second_fields.get(k)}"
            for k in sorted(first_fields | second_fields)
            if first_fields.get(k) != second_fields.get(k)
        )
        raise DataError(
            f"scores that were measured differently are not compared: {abbreviate(first_cells)} against"
            f" {abbreviate(second_cells)} ({differing}); run the study again, and the stages that are stale are measured anew"
        )


def estimate(values: Sequence[float], confidence: float) -> Estimate:
    """Mean of `values` with its t interval."""
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, None, n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return Estimate(mean, (mean - half, mean + half), n)


def _variants(by_variant: dict[str, list[Run]], confidence: float) -> list[Variant]:
    cost_points = {name: (_mean(runs, SCORE), _mean(runs, HOURS)) for name, runs in by_variant.items()}
    variants = [
        Variant(
            name=name,
            score=estimate([run.metrics[SCORE] for run in runs], confidence),
            hours=cost_points[name][1],
            memory_mib=_mean(runs, MEMORY),
            gpu_wh=_mean_of_all(runs, GPU_WH),
            cpu_wh=_mean_of_all(runs, CPU_WH),
            best_at_its_cost=on_front(name, cost_points),
        )
        for name, runs in by_variant.items()
    ]
    return sorted(variants, key=_score, reverse=True)


def _mean(runs: Sequence[Run], metric: str) -> float:
    return float(np.mean([run.metrics[metric] for run in runs]))


def _mean_of_all(runs: Sequence[Run], metric: str) -> float | None:
    return _mean(runs, metric) if all(metric in run.metrics for run in runs) else None


def on_front(name: str, points: dict[str, tuple[float, float]]) -> bool:
    """Membership of the Pareto front: no other point has at least the score at no more cost, one of the two strictly."""
    score, cost = points[name]
    return not any(
        other_score >= score and other_cost <= cost and (other_score, other_cost) != (score, cost)
        for other_score, other_cost in points.values()
    )


def equal_compute(variants: Sequence[Variant]) -> list[tuple[Variant, Variant | None]]:
    """Pairs of each variant and the best other at no more device hours, within SLACK; None if no other is as cheap."""
    pairs = []
    for variant in variants:
        rivals = (v for v in variants if v is not variant and v.hours <= variant.hours * (1 + SLACK))
        pairs.append((variant, max(rivals, key=_score, default=None)))
    return pairs


def _score(variant: Variant) -> float:
    return variant.score.mean


def _tests(family: Family, by_variant: dict[str, list[Run]], confidence: float) -> list[Test]:
    from scipy import stats

    scores = {variant: {run.seed: run.metrics[SCORE] for run in runs} for variant, runs in by_variant.items()}
    pairs: list[tuple[str, str, list[float]]] = []
    for baseline, variant in itertools.product(family.against, family.variants):
        variant_scores, baseline_scores = scores.get(variant, {}), scores.get(baseline, {})
        gaps = [variant_scores[seed] - baseline_scores[seed] for seed in variant_scores if seed in baseline_scores]
        if variant != baseline and gaps:
            pairs.append((variant, baseline, gaps))
    p_values = [float(stats.ttest_1samp(d, 0.0).pvalue) if len(d) > 1 and np.ptp(d) > ROUNDING else None for _, _, d in pairs]
    tested = [p for p in p_values if p is not None]
    adjusted = iter(holm(tested) if tested else [])
    return [
        Test(variant, against, estimate(d, confidence), p, None if p is None else next(adjusted))
        for (variant, against, d), p in zip(pairs, p_values, strict=True)
    ]


def _effects(factor: str, runs: Sequence[Run], confidence: float) -> list[Effect]:
    """Main effects of each level of `factor` against the first, in the study's order."""
    blocks: dict[tuple[tuple[str, str], ...], dict[str, float]] = defaultdict(dict)
    for run in runs:
        fixed = tuple(sorted((path, value) for path, value in run.params.items() if path != factor))
        blocks[fixed][run.params.get(factor, "")] = run.metrics[SCORE]
    reference, *levels = dict.fromkeys(run.params.get(factor, "") for run in runs)
    effects = []
    for level in levels:
        pairs = [block[level] - block[reference] for block in blocks.values() if level in block and reference in block]
        if pairs:
            effects.append(Effect(factor, level, reference, estimate(pairs, confidence)))
    return effects


def abbreviate(cells: Sequence[str]) -> str:
    return ", ".join(cells[:3]) + (f" and {len(cells) - 3} more" if len(cells) > 3 else "")
