"""Stage `compare`: paired comparison of all arms and the teacher, with intervals.

    python -m components.evaluate.compare

Reads the per-sample predictions of all arms and of the teacher, refuses arms that answered different questions, and
writes reports/compare.json, compare.md, plots/*.png, the self-contained report.html, and DVC's metrics and plots (`dvc_files`).
"""

from __future__ import annotations

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
from components.config.study import Arm
from components.evaluate import dvc_files
from components.evaluate.fingerprint import differences
from components.evaluate.headline import headline, leaders, listed, spoken, standing
from components.evaluate.load_results import Outcomes, read
from components.evaluate.measures import ALWAYS, EXACT_MATCH, MEASURES
from components.evaluate.metrics import OVERALL
from components.evaluate.statistics import (
    Interval,
    Scored,
    between_seeds,
    bootstrap,
    detectable,
    holm,
    interval,
    mcnemar,
    noise,
    over_seeds,
    p_value,
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
        prints = self.outcomes.fingerprints
        pairs = product(self.runs[arm], self.runs[other])
        return list(dict.fromkeys(what for a, b in pairs for what in differences(prints[a], prints[b])))


@dataclass(frozen=True)
class Sampled:
    """One measure of all arms, as observed and on every bootstrap draw of images and seeds."""

    names: list[str]
    observed: Scored
    resampled: Scored
    spread: float | None  # standard deviation between runs of one arm; None without repeats

    def value(self, name: str) -> float:
        return float(self.observed.overall[self.names.index(name)])

    def draws(self, name: str) -> NDArray[np.float64]:
        drawn: NDArray[np.float64] = self.resampled.overall[:, self.names.index(name)]
        return drawn


def compare(
    outcomes: Outcomes, settings: EvaluateSettings, study: Mapping[str, Arm], published: PublishedRuns | None = None
) -> Comparison:
    """Comparison of all arms; `settings` gives resamples, confidence, seed and baselines, `study` the arms' settings."""
    arms = runs_of(study, outcomes.costs)
    asked = outcomes.predictions[TEACHER_ARM]
    kinds = dict(sorted(Counter(p.kind for p in asked).items()))
    systems = Systems({TEACHER_ARM: [TEACHER_ARM], **arms}, outcomes, kinds, settings)
    sampled = {measure: _sampled(measure, systems) for measure in (*ALWAYS, *settings.scorers)}
    exact = sampled.pop(EXACT_MATCH)
    results = {name: _result(name, exact, sampled, systems) for name in systems.runs}
    teacher = results.pop(TEACHER_ARM)
    order = sorted(arms, key=lambda arm: -results[arm].exact_match)  # stable: equal scores stay in the study's order
    contrast = _contrast(exact, order, systems, closed=outcomes.yes_no[TEACHER_ARM].keys() - {OVERALL})
    settings_of = varied({arm: study[arm].model_dump(mode="json", exclude={"seed"}, exclude_none=True) for arm in arms})
    complete = {
        arm: ArmResult(
            **results[arm].model_dump(),
            settings=settings_of[arm],
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
        n=len(asked),
        images=len({p.image_id for p in asked}),
        kinds=kinds,
        confidence=settings.confidence,
        resamples=settings.bootstrap_resamples,
        method=METHOD.format(resamples=settings.bootstrap_resamples, pairs=len(contrast.pairs)),
        teacher=teacher,
        arms=complete,
        order=order,
        exact_match=contrast,
        measures={name: _contrast(found, order, systems) for name, found in sampled.items()},
        published=published,
    )
    return comparison.model_copy(update={"headline": headline(comparison), "standing": standing(comparison)})


def runs_of(study: Mapping[str, Arm], trained: Iterable[str]) -> dict[str, list[str]]:
    """Arm -> its trained runs, which share every setting but the seed. The first run's name is the arm's."""
    groups: dict[str, list[str]] = defaultdict(list)
    for run in trained:
        groups[study[run].model_dump_json(exclude={"seed"})].append(run)
    return {group[0]: group for group in groups.values()}


def _codes(values: list[str], names: list[str]) -> NDArray[np.int_]:
    code = {name: index for index, name in enumerate(names)}
    return np.array([code[value] for value in values])


def _sampled(measure: str, systems: Systems) -> Sampled:
    predictions, likelihoods, settings = systems.outcomes.predictions, systems.outcomes.likelihoods, systems.settings
    terms = MEASURES[measure].terms
    found = [[terms(p, told) for p, told in zip(predictions[run], likelihoods[run], strict=True)] for run in predictions]
    values, weights = np.moveaxis(np.array(found, dtype=np.float64), -1, 0)
    asked = predictions[TEACHER_ARM]
    observed, resampled = bootstrap(
        values,
        images=_codes([p.image_id for p in asked], list(dict.fromkeys(p.image_id for p in asked))),
        kinds=_codes([p.kind for p in asked], list(systems.kinds)),
        resamples=settings.bootstrap_resamples,
        seed=settings.seed,
        weights=weights,
    )
    index = {run: row for row, run in enumerate(predictions)}
    groups = [[index[run] for run in runs] for runs in systems.runs.values()]
    spread = float(between_seeds(observed.overall, groups))
    means = over_seeds(observed, resampled, groups, settings.seed)
    return Sampled(list(systems.runs), *means, spread=None if np.isnan(spread) else spread)


def _result(name: str, exact: Sampled, others: Mapping[str, Sampled], systems: Systems) -> TeacherResult:
    row, observed, resampled = exact.names.index(name), exact.observed, exact.resampled
    confidence, kinds = systems.settings.confidence, systems.kinds
    return TeacherResult(
        exact_match=exact.value(name),
        ci95=interval(exact.draws(name), confidence),
        average=float(observed.average[row]),
        average_ci95=interval(resampled.average[:, row], confidence),
        per_kind={kind: float(observed.per_kind[row, k]) for k, kind in enumerate(kinds)},
        per_kind_ci95={kind: interval(resampled.per_kind[:, row, k], confidence) for k, kind in enumerate(kinds)},
        yes_no=_mean_yes_no([systems.outcomes.yes_no[run] for run in systems.runs[name]]),
        measures={
            measure: Estimate(
                value=found.value(name),
                ci95=interval(found.draws(name), confidence),
                per_kind={kind: float(found.observed.per_kind[row, k]) for k, kind in enumerate(kinds)},
            )
            for measure, found in others.items()
        },
        differs=[] if name == TEACHER_ARM else systems.differs(name, TEACHER_ARM),
    )


def _mean_yes_no(runs: list[dict[str, YesNo]]) -> dict[str, YesNo]:
    """Yes/no figures per kind, averaged over runs on the same questions."""
    names = [name for name in YesNo.model_fields if name != "samples"]
    return {
        kind: found.model_copy(update={name: fmean(getattr(run[kind], name) for run in runs) for name in names})
        for kind, found in runs[0].items()
    }


def _cost(runs: list[Cost]) -> dict[str, Any]:
    return {
        **runs[0].model_dump(),
        "train_seconds": fmean(run.train_seconds for run in runs),
        "step_seconds": fmean(run.seconds_per_step for run in runs),
        "peak_memory_mib": max(run.peak_memory_mib for run in runs),
    }


def _contrast(sampled: Sampled, order: list[str], systems: Systems, closed: Collection[str] = ()) -> Contrast:
    """Differences of each arm and each ranked below it. `closed`: yes/no kinds, for McNemar's test of two single runs."""
    confidence, runs = systems.settings.confidence, systems.runs
    pairs = list(combinations(order, 2))
    gaps = [sampled.draws(arm) - sampled.draws(other) for arm, other in pairs]
    p_values = [p_value(gap) for gap in gaps]
    right = {arm: [p.correct for p in systems.outcomes.predictions[arm] if p.kind in closed] for arm in order}
    return Contrast(
        pairs=[
            Difference(
                arm=arm,
                against=other,
                difference=sampled.value(arm) - sampled.value(other),
                ci95=interval(gap, confidence),
                p_value=p,
                p_holm=adjusted,
                p_mcnemar=mcnemar(right[arm], right[other]) if closed and len(runs[arm] + runs[other]) == 2 else None,
                differs=systems.differs(arm, other),
            )
            for (arm, other), gap, p, adjusted in zip(pairs, gaps, p_values, holm(p_values), strict=True)
        ],
        noise=median(noise(gap, confidence) for gap in gaps) if gaps else None,
        detectable=median(detectable(gap, confidence, POWER) for gap in gaps) if gaps else None,
        spread=sampled.spread,
    )


def _share(draws: NDArray[np.float64], of: NDArray[np.float64], confidence: float) -> Interval:
    """Interval of the ratio `draws` / `of`; resamples with a zero denominator are left out."""
    return interval(np.divide(draws, of, out=np.full_like(draws, np.nan), where=of > 0), confidence)


def without_teacher(arms: Iterable[str], none: str) -> str:
    """Exact match per arm as Markdown, for a run without a teacher (stage align)."""
    scores = [(arm, f"{Scores.read(SCORES / arm / 'scores.json').exact_match:.1%}") for arm in arms]
    return f"No comparison: {none}. What each arm answers by itself:\n\n{md.table(['arm', 'exact match'], scores)}\n"


def main() -> None:
    settings = load_settings()
    if none := Absent.reason_at(SCORES / TEACHER_ARM / "scores.json"):
        text = without_teacher(settings.study.arms, none)
        Absent(none=none).write(REPORTS / "compare.json")
        dvc_files.write(None, {})
        write_text(REPORTS / "compare.md", text)
        write_text(REPORTS / "report.html", f"<!doctype html><title>Align-TI</title><pre>{text}</pre>\n")
        shutil.rmtree(REPORTS / "plots", ignore_errors=True)
        (REPORTS / "plots").mkdir()
        print(f"compare: nothing to do, {none}")
        return

    from components.evaluate import published_runs, report
    from components.tracking import outcome, provenance
    from components.tracking.stage_run import send, stage_run

    with stage_run("compare", runtime=settings.runtime, params={"resamples": settings.evaluate.bootstrap_resamples}) as run:
        outcomes = read(settings.study.arms)
        comparison = compare(outcomes, settings.evaluate, settings.study.arms, published_runs.nearest())
        written = [comparison.write(REPORTS / "compare.json"), *dvc_files.write(comparison, outcomes.losses)]
        written += report.write(comparison, outcomes, settings.evaluate)
        run.metrics(_tracked(comparison))
        run.tag("best_arm", comparison.order[0])
        scores = {"teacher/exact_match": comparison.teacher.exact_match}
        scores |= {f"{arm}/exact_match": result.exact_match for arm, result in comparison.arms.items()}
        run.headline(scores, comparison.headline)
        for path in written:
            run.artifact(path)
    students = {arm: provenance.locked().get(f"distill@{arm}", {}).get(str(STUDENTS / arm)) for arm in comparison.order}
    send([outcome.of_arm(arm, md5, settings) for arm, md5 in students.items() if md5], settings.runtime)
    best = leaders(comparison)
    print(
        f"compare: best arm {listed(best)}, {spoken(comparison.arms[best[0]])} against the teacher's"
        f" {comparison.teacher.exact_match:.1%}; report in {REPORTS / 'report.html'}"
    )


def _tracked(comparison: Comparison) -> dict[str, float]:
    figures = {"teacher/exact_match": comparison.teacher.exact_match}
    for name, result in [(TEACHER_ARM, comparison.teacher), *comparison.arms.items()]:
        figures |= {f"{name}/{measure}": found.value for measure, found in result.measures.items()}
    for arm, result in comparison.arms.items():
        figures |= {f"{arm}/exact_match": result.exact_match, f"{arm}/step_seconds": result.step_seconds}
        figures |= {f"{arm}/gain_over_{base}": gain.difference for base, gain in result.gains.items()}
    return figures


if __name__ == "__main__":
    exit_from(main)
