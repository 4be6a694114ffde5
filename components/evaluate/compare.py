"""Stage `compare`: paired comparison of all arms and the teacher, with intervals.

    python -m components.evaluate.compare

Reads the per-sample predictions of all arms and of the teacher, refuses arms that answered different questions, and
writes reports/compare.json, compare.md, plots/*.png, the self-contained report.html, and DVC's metrics and plots (`dvc_files`).
"""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.config.evaluate import EvaluateSettings
from components.config.load import load_settings
from components.config.settings import Settings
from components.config.study import Arm
from components.evaluate import dvc_files
from components.evaluate.fingerprint import differences
from components.evaluate.headline import format_score, headline, join_names, leaders, ranking
from components.evaluate.load_results import Outcomes, read
from components.evaluate.measures import DEFAULT_MEASURES, EXACT_MATCH, MEASURES
from components.evaluate.statistics import (
    Interval,
    ScoreArrays,
    average_over_seeds,
    bootstrap,
    detectable,
    holm,
    interval,
    mcnemar,
    noise,
    p_value,
    seed_deviation,
)
from components.io import write_text
from components.process import exit_from
from components.records.compare import ArmResult, Comparison, Contrast, Difference, Estimate, PublishedRuns, TeacherResult
from components.records.distill import Cost
from components.records.evaluate import Scores, YesNo
from components.records.paths import REPORTS, SCORES, STUDENTS, TEACHER_ARM
from components.records.record import Absent
from components.report import markdown as md
from components.tracking.outcome import varied

POWER = 0.8  # power at which a difference counts as detectable

METHOD = (
    "Percentile intervals of a cluster bootstrap over images (questions about one image are drawn together); all arms are"
    " scored on the same {resamples:,} draws, so differences are paired. p: two-sided, the same interval inverted;"
    " p (Holm): adjusted for the number of pairs of arms, {pairs}."
)


@dataclass(frozen=True)
class Systems:
    """Teacher and arms: the runs of each, their outcomes, and how they are compared."""

    runs: dict[str, list[str]]  # `teacher` first
    outcomes: Outcomes
    kinds: dict[str, int]  # questions of each kind
    settings: EvaluateSettings

    def differs(self, arm: str, other: str) -> list[str]:
        """Differences between the fingerprints of any two runs of the two arms."""
        fingerprints = self.outcomes.fingerprints
        pairs = product(self.runs[arm], self.runs[other])
        return list(dict.fromkeys(difference for a, b in pairs for difference in differences(fingerprints[a], fingerprints[b])))


@dataclass(frozen=True)
class MeasureDraws:
    """One measure of all arms, as observed and on every bootstrap draw of images and seeds."""

    names: list[str]
    observed: ScoreArrays
    resampled: ScoreArrays
    spread: float | None  # standard deviation between runs of one arm; None without repeats

    def value(self, name: str) -> float:
        return float(self.observed.overall[self.names.index(name)])

    def draws(self, name: str) -> NDArray[np.float64]:
        column: NDArray[np.float64] = self.resampled.overall[:, self.names.index(name)]
        return column


def compare(
    outcomes: Outcomes, settings: EvaluateSettings, study: Mapping[str, Arm], published: PublishedRuns | None = None
) -> Comparison:
    """Comparison of all arms; `settings` gives resamples, confidence, seed and baselines, `study` the arms' settings."""
    arms = runs_by_arm(study, outcomes.costs)
    questions = outcomes.predictions[TEACHER_ARM]
    kinds = dict(sorted(Counter(p.kind for p in questions).items()))
    systems = Systems({TEACHER_ARM: [TEACHER_ARM], **arms}, outcomes, kinds, settings)
    measures = {measure: _draw_measure(measure, systems) for measure in (*DEFAULT_MEASURES, *settings.scorers)}
    exact = measures.pop(EXACT_MATCH)
    results = {name: _result(name, exact, measures, systems) for name in systems.runs}
    teacher = results.pop(TEACHER_ARM)
    order = sorted(arms, key=lambda arm: -results[arm].exact_match)  # stable: equal scores stay in the study's order
    contrast = _contrast(exact, order, systems, yes_no_kinds=outcomes.yes_no[TEACHER_ARM].keys())
    varied_settings = varied({arm: study[arm].model_dump(mode="json", exclude={"seed"}, exclude_none=True) for arm in arms})
    arm_results = {
        arm: ArmResult(
            **results[arm].model_dump(),
            settings=varied_settings[arm],
            runs={run: float(np.mean([p.correct for p in outcomes.predictions[run]])) for run in runs},
            share_of_teacher=results[arm].exact_match / teacher.exact_match if teacher.exact_match else None,
            share_ci95=_share(exact.draws(arm), exact.draws(TEACHER_ARM), settings.confidence) if teacher.exact_match else None,
            gains={base: gain for base in settings.baselines if (gain := contrast.gain(arm, base))},
            **_cost([outcomes.costs[run] for run in runs]),
        )
        for arm, runs in arms.items()
    }
    comparison = Comparison(
        headline="",
        standing="",
        split=settings.split,
        n=len(questions),
        images=len({p.image_id for p in questions}),
        kinds=kinds,
        confidence=settings.confidence,
        resamples=settings.bootstrap_resamples,
        method=METHOD.format(resamples=settings.bootstrap_resamples, pairs=len(contrast.pairs)),
        teacher=teacher,
        arms=arm_results,
        order=order,
        exact_match=contrast,
        measures={name: _contrast(measure, order, systems) for name, measure in measures.items()},
        published=published,
    )
    return comparison.model_copy(update={"headline": headline(comparison), "standing": ranking(comparison)})


def runs_by_arm(study: Mapping[str, Arm], trained: Iterable[str]) -> dict[str, list[str]]:
    """Arm -> its trained runs, which share every setting but the seed. The first run's name is the arm's."""
    groups: dict[str, list[str]] = defaultdict(list)
    for run in trained:
        groups[study[run].model_dump_json(exclude={"seed"})].append(run)
    return {group[0]: group for group in groups.values()}


def _draw_measure(measure: str, systems: Systems) -> MeasureDraws:
    predictions, likelihoods, settings = systems.outcomes.predictions, systems.outcomes.likelihoods, systems.settings
    terms = MEASURES[measure].terms
    terms_per_run = [
        [terms(p, likelihood) for p, likelihood in zip(predictions[run], likelihoods[run], strict=True)] for run in predictions
    ]
    values, weights = np.moveaxis(np.array(terms_per_run, dtype=np.float64), -1, 0)
    questions = predictions[TEACHER_ARM]
    observed, resampled = bootstrap(
        values,
        images=[p.image_id for p in questions],
        kinds=[p.kind for p in questions],
        resamples=settings.bootstrap_resamples,
        seed=settings.seed,
        weights=weights,
    )
    run_index = {run: row for row, run in enumerate(predictions)}
    groups = [[run_index[run] for run in runs] for runs in systems.runs.values()]
    spread = float(seed_deviation(observed.overall, groups))
    means = average_over_seeds(observed, resampled, groups, settings.seed)
    return MeasureDraws(list(systems.runs), *means, spread=None if np.isnan(spread) else spread)


def _result(name: str, exact: MeasureDraws, measures: Mapping[str, MeasureDraws], systems: Systems) -> TeacherResult:
    index, observed, resampled = exact.names.index(name), exact.observed, exact.resampled
    confidence, kinds = systems.settings.confidence, systems.kinds
    outcomes, runs = systems.outcomes, systems.runs[name]
    overall = [figures for run in runs if (figures := outcomes.yes_no_overall[run])]
    return TeacherResult(
        exact_match=exact.value(name),
        ci95=interval(exact.draws(name), confidence),
        average=float(observed.average[index]),
        average_ci95=interval(resampled.average[:, index], confidence),
        per_kind={kind: float(observed.per_kind[index, k]) for k, kind in enumerate(kinds)},
        per_kind_ci95={kind: interval(resampled.per_kind[:, index, k], confidence) for k, kind in enumerate(kinds)},
        yes_no={kind: _mean_yes_no([outcomes.yes_no[run][kind] for run in runs]) for kind in outcomes.yes_no[runs[0]]},
        yes_no_overall=_mean_yes_no(overall) if overall else None,
        measures={
            key: Estimate(
                value=measure.value(name),
                ci95=interval(measure.draws(name), confidence),
                per_kind={kind: float(measure.observed.per_kind[index, k]) for k, kind in enumerate(kinds)},
            )
            for key, measure in measures.items()
        },
        differs=[] if name == TEACHER_ARM else systems.differs(name, TEACHER_ARM),
    )


def _mean_yes_no(runs: list[YesNo]) -> YesNo:
    """Yes/no figures averaged over runs on the same questions."""
    names = [name for name in YesNo.model_fields if name != "samples"]
    return runs[0].model_copy(update={name: fmean(getattr(run, name) for run in runs) for name in names})


def _cost(runs: list[Cost]) -> dict[str, Any]:
    return {
        **runs[0].model_dump(),
        "train_seconds": fmean(run.train_seconds for run in runs),
        "step_seconds": fmean(run.seconds_per_step for run in runs),
        "peak_memory_mib": max(run.peak_memory_mib for run in runs),
    }


def _contrast(measure: MeasureDraws, order: list[str], systems: Systems, yes_no_kinds: Collection[str] = ()) -> Contrast:
    """Differences of each arm and each ranked below it. `yes_no_kinds`: for McNemar's test of two single runs."""
    confidence, runs = systems.settings.confidence, systems.runs
    pairs = list(combinations(order, 2))
    gaps = [measure.draws(arm) - measure.draws(other) for arm, other in pairs]
    p_values = [p_value(gap) for gap in gaps]
    correct = {arm: [p.correct for p in systems.outcomes.predictions[arm] if p.kind in yes_no_kinds] for arm in order}
    return Contrast(
        pairs=[
            Difference(
                arm=arm,
                against=other,
                difference=measure.value(arm) - measure.value(other),
                ci95=interval(gap, confidence),
                p_value=p,
                p_holm=adjusted,
                p_mcnemar=mcnemar(correct[arm], correct[other]) if yes_no_kinds and len(runs[arm] + runs[other]) == 2 else None,
                differs=systems.differs(arm, other),
            )
            for (arm, other), gap, p, adjusted in zip(pairs, gaps, p_values, holm(p_values), strict=True)
        ],
        noise=median(noise(gap, confidence) for gap in gaps) if gaps else None,
        detectable=median(detectable(gap, confidence, POWER) for gap in gaps) if gaps else None,
        spread=measure.spread,
    )


def _share(draws: NDArray[np.float64], teacher_draws: NDArray[np.float64], confidence: float) -> Interval:
    """Interval of the ratio `draws` / `teacher_draws`; resamples with a zero denominator are left out."""
    return interval(np.divide(draws, teacher_draws, out=np.full_like(draws, np.nan), where=teacher_draws > 0), confidence)


def markdown_without_teacher(arms: Iterable[str], reason: str) -> str:
    """Exact match per arm as Markdown, for a run without a teacher (stage align)."""
    scores = [(arm, f"{Scores.read(SCORES / arm / 'scores.json').exact_match:.1%}") for arm in arms]
    return f"No comparison: {reason}. What each arm answers by itself:\n\n{md.table(['arm', 'exact match'], scores)}\n"


def record_arms(settings: Settings) -> None:
    """Record the outcome of each arm, one per seed, and send it; a study records its cells itself."""
    from components.tracking import history, outcome, provenance
    from components.tracking.stage_run import PARENT, send

    if history.tags(os.environ.get(PARENT, "")).get("stage", "").startswith("study-"):
        return
    locked = provenance.locked()
    students = {arm: locked.get(f"distill@{arm}", {}).get(str(STUDENTS / arm)) for arm in settings.study.arms}
    send([outcome.of_arm(arm, md5, settings) for arm, md5 in students.items() if md5], settings.runtime)


def main() -> None:
    settings = load_settings()
    if no_teacher := Absent.reason_at(SCORES / TEACHER_ARM / "scores.json"):
        text = markdown_without_teacher(settings.study.arms, no_teacher)
        Absent(none=no_teacher).write(REPORTS / "compare.json")
        dvc_files.write(None, {})
        write_text(REPORTS / "compare.md", text)
        write_text(REPORTS / "report.html", f"<!doctype html><title>Align-TI</title><pre>{text}</pre>\n")
        shutil.rmtree(REPORTS / "plots", ignore_errors=True)
        (REPORTS / "plots").mkdir()
        print(f"compare: nothing to do, {no_teacher}")
        return

    from components.evaluate import published_runs, report
    from components.tracking.stage_run import stage_run

    with stage_run("compare", runtime=settings.runtime, params={"resamples": settings.evaluate.bootstrap_resamples}) as run:
        outcomes = read(settings.study.arms)
        comparison = compare(outcomes, settings.evaluate, settings.study.arms, published_runs.nearest())
        written = [comparison.write(REPORTS / "compare.json"), *dvc_files.write(comparison, outcomes.losses)]
        written += report.write(comparison, outcomes, settings.evaluate)
        run.metrics(_mlflow_metrics(comparison))
        run.tag("best_arm", comparison.order[0])
        scores = {"teacher/exact_match": comparison.teacher.exact_match}
        scores |= {f"{arm}/exact_match": result.exact_match for arm, result in comparison.arms.items()}
        run.headline(scores, comparison.headline)
        for path in written:
            run.artifact(path)
    record_arms(settings)
    best = leaders(comparison)
    who = f"best arm {join_names(best)}" if comparison.arms[best[0]].exact_match else "every arm"
    print(
        f"compare: {who}, {format_score(comparison.arms[best[0]])} against the teacher's"
        f" {comparison.teacher.exact_match:.1%}; report in {REPORTS / 'report.html'}"
    )


def _mlflow_metrics(comparison: Comparison) -> dict[str, float]:
    figures = {"teacher/exact_match": comparison.teacher.exact_match}
    for name, result in [(TEACHER_ARM, comparison.teacher), *comparison.arms.items()]:
        figures |= {f"{name}/{measure}": estimate.value for measure, estimate in result.measures.items()}
    for arm, result in comparison.arms.items():
        figures |= {f"{arm}/exact_match": result.exact_match, f"{arm}/step_seconds": result.step_seconds}
        figures |= {f"{arm}/gain_over_{base}": gain.difference for base, gain in result.gains.items()}
    return figures


if __name__ == "__main__":
    exit_from(main)
