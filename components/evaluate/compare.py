"""Stage `compare`: every arm beside every other and the teacher, with how sure each number is.

    python -m components.evaluate.compare

Reads the per-sample predictions of all arms and of the teacher, refuses arms that answered different questions, and
writes reports/compare.json, compare.md, plots/*.png and the self-contained report.html.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.artifacts import (
    REPORTS,
    SCORES,
    TEACHER_ARM,
    Absent,
    ArmResult,
    Comparison,
    Difference,
    OverSeeds,
    Scores,
    TeacherResult,
    write_text,
)
from components.errors import exit_from
from components.evaluate.fingerprint import differences
from components.evaluate.metrics import OVERALL
from components.evaluate.outcomes import Outcomes, read
from components.evaluate.statistics import (
    Interval,
    Scored,
    bootstrap,
    detectable,
    holm,
    interval,
    mcnemar,
    noise,
    over_seeds,
    p_value,
)
from components.settings import Arm, EvaluateSettings, load_settings

POWER = 0.8  # of a gap called detectable

METHOD = (
    "Percentile intervals of a cluster bootstrap over images (questions about one image are drawn together); all arms are"
    " scored on the same {resamples:,} draws, so differences are paired. p: two-sided, the same interval inverted;"
    " p (Holm): adjusted for the number of pairs of arms, {pairs}."
)


def compare(outcomes: Outcomes, settings: EvaluateSettings, study: Mapping[str, Arm]) -> Comparison:
    """All figures of the comparison; `settings` gives resamples, confidence, seed and baselines, `study` the arms' settings."""
    arms = list(outcomes.costs)
    rows = [TEACHER_ARM, *arms]
    asked = outcomes.predictions[TEACHER_ARM]
    kinds = Counter(sorted(p.kind for p in asked))
    image_ids = list(dict.fromkeys(p.image_id for p in asked))
    observed, resampled = bootstrap(
        correct=[[p.correct for p in outcomes.predictions[row]] for row in rows],
        images=_codes([p.image_id for p in asked], image_ids),
        kinds=_codes([p.kind for p in asked], list(kinds)),
        resamples=settings.bootstrap_resamples,
        seed=settings.seed,
    )
    results = {
        row: TeacherResult(
            yes_no=outcomes.yes_no[row],
            differs=[] if row == TEACHER_ARM else differences(outcomes.fingerprints[row], outcomes.fingerprints[TEACHER_ARM]),
            **_figures(index, list(kinds), observed, resampled, settings.confidence),
        )
        for index, row in enumerate(rows)
    }
    teacher = results.pop(TEACHER_ARM)
    order = sorted(arms, key=lambda arm: -results[arm].exact_match)  # stable: equal scores stay in the study's order
    draws = {row: resampled.overall[:, index] for index, row in enumerate(rows)}
    scores = {row: float(observed.overall[index]) for index, row in enumerate(rows)}
    pairs = _differences(order, scores, draws, outcomes, settings.confidence)
    gaps = [draws[pair.arm] - draws[pair.against] for pair in pairs]
    complete = {
        arm: ArmResult(
            **results[arm].model_dump(),
            share_of_teacher=results[arm].exact_match / teacher.exact_match if teacher.exact_match else None,
            share_ci95=_share(draws[arm], draws[TEACHER_ARM], settings.confidence) if teacher.exact_match else None,
            gains={base: _oriented(pairs, arm, base) for base in settings.baselines if base != arm},
            **outcomes.costs[arm].model_dump(),
        )
        for arm in arms
    }
    comparison = Comparison(
        headline="",
        standing="",
        split=settings.split,
        n=len(asked),
        images=len(image_ids),
        kinds=dict(kinds),
        confidence=settings.confidence,
        resamples=settings.bootstrap_resamples,
        method=METHOD.format(resamples=settings.bootstrap_resamples, pairs=len(pairs)),
        teacher=teacher,
        arms=complete,
        order=order,
        pairs=pairs,
        noise=median(noise(gap, settings.confidence) for gap in gaps) if gaps else None,
        detectable=median(detectable(gap, settings.confidence, POWER) for gap in gaps) if gaps else None,
        seeds=[_over_seeds(group, scores, draws, settings) for group in same_but_seed(study)],
    )
    return comparison.model_copy(update={"headline": headline(comparison), "standing": standing(comparison)})


def headline(comparison: Comparison) -> str:
    """What may be said of the best arms: of each lead what its interval says, and what Holm's correction leaves of it."""
    best = leaders(comparison)
    alike = {pair.against for pair in comparison.pairs if pair.arm == best[0] and not pair.differs}
    others = [arm for arm in comparison.order[len(best) :] if arm in alike]
    verb = "answers" if len(best) == 1 else "each answer"
    words = f"{listed(best)} {verb} {spoken(comparison.arms[best[0]])} of the {comparison.split} questions right"
    if len(best) == len(comparison.order):
        return f"{words}."
    words += f", the most of {len(comparison.order)} arms."
    if not others:
        return f"{words} No other arm was measured in the same way, so none compares with it."
    clear = {pair.against for pair in comparison.pairs if pair.arm == best[0] and pair.larger_than_noise}
    beyond = [arm for arm in others if arm in clear]
    within = [arm for arm in others if arm not in clear]
    lead = "Its lead" if len(best) == 1 else f"The lead of {best[0]}"
    if not beyond:
        return f"{words} {lead} over no other arm is larger than the noise of the test sample."
    words += f" {lead} over {listed(beyond) if within else 'every other arm'} is larger than the noise of the test sample"
    words += f"; over {listed(within)} it is not." if within else "."
    kept = {pair.against for pair in comparison.pairs if pair.arm == best[0] and pair.p_holm < 1 - comparison.confidence}
    still = [arm for arm in beyond if arm in kept]
    held = "all of them" if still == beyond else listed(still) if still else "none of them"
    return f"{words} Adjusted for {len(comparison.pairs)} pairs (Holm), this holds over {held}."


def same_but_seed(study: Mapping[str, Arm]) -> list[list[str]]:
    """The groups of two or more arms that share every setting but the seed."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, arm in study.items():
        groups[arm.model_dump_json(exclude={"seed"})].append(name)
    return [group for group in groups.values() if len(group) > 1]


def leaders(comparison: Comparison) -> list[str]:
    """The arms with the best score: more than one where they tie."""
    best = comparison.arms[comparison.order[0]].exact_match
    return [arm for arm in comparison.order if comparison.arms[arm].exact_match == best]


def standing(comparison: Comparison) -> str:
    """The order of the arms and the teacher's score, with their intervals."""
    order = ", ".join(f"{arm} {spoken(comparison.arms[arm])}" for arm in comparison.order)
    return (
        f"On {comparison.n:,} {comparison.split} questions about {comparison.images:,} images the order is {order};"
        f" the teacher has {spoken(comparison.teacher)}. In brackets {comparison.confidence:.0%} intervals; one training run"
        " per arm."
    )


def spoken(result: TeacherResult) -> str:
    low, high = result.ci95
    return f"{result.exact_match:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _codes(values: list[str], names: list[str]) -> NDArray[np.int_]:
    code = {name: index for index, name in enumerate(names)}
    return np.array([code[value] for value in values])


def _figures(index: int, kinds: list[str], observed: Scored, resampled: Scored, confidence: float) -> dict[str, Any]:
    return {
        "exact_match": float(observed.overall[index]),
        "ci95": interval(resampled.overall[:, index], confidence),
        "average": float(observed.average[index]),
        "average_ci95": interval(resampled.average[:, index], confidence),
        "per_kind": {kind: float(observed.per_kind[index, k]) for k, kind in enumerate(kinds)},
        "per_kind_ci95": {kind: interval(resampled.per_kind[:, index, k], confidence) for k, kind in enumerate(kinds)},
    }


def _differences(
    order: list[str], observed: dict[str, float], draws: dict[str, NDArray[np.float64]], outcomes: Outcomes, confidence: float
) -> list[Difference]:
    """Each arm minus each that ranks below it."""
    pairs = list(combinations(order, 2))
    closed = outcomes.yes_no[TEACHER_ARM].keys() - {OVERALL}
    right = {arm: [p.correct for p in outcomes.predictions[arm] if p.kind in closed] for arm in order}
    p_values = [p_value(draws[arm] - draws[other]) for arm, other in pairs]
    return [
        Difference(
            arm=arm,
            against=other,
            difference=observed[arm] - observed[other],
            ci95=interval(draws[arm] - draws[other], confidence),
            p_value=p,
            p_holm=adjusted,
            p_mcnemar=mcnemar(right[arm], right[other]) if closed else None,
            differs=differences(outcomes.fingerprints[arm], outcomes.fingerprints[other]),
        )
        for (arm, other), p, adjusted in zip(pairs, p_values, holm(p_values), strict=True)
    ]


def _over_seeds(
    group: list[str], scores: dict[str, float], draws: dict[str, NDArray[np.float64]], settings: EvaluateSettings
) -> OverSeeds:
    found = [scores[arm] for arm in group]
    drawn = over_seeds(np.stack([draws[arm] for arm in group], axis=1), settings.seed)
    return OverSeeds(
        arms=group, exact_match=fmean(found), ci95=interval(drawn, settings.confidence), standard_deviation=stdev(found)
    )


def _oriented(pairs: list[Difference], arm: str, against: str) -> Difference:
    """The pair as `arm` minus `against`, whichever of them ranks higher."""
    pair = next(p for p in pairs if {p.arm, p.against} == {arm, against})
    if pair.arm == arm:
        return pair
    low, high = pair.ci95
    turned = {"arm": arm, "against": against, "difference": 0.0 - pair.difference, "ci95": (0.0 - high, 0.0 - low)}
    return pair.model_copy(update=turned)


def _share(draws: NDArray[np.float64], of: NDArray[np.float64], confidence: float) -> Interval:
    """Interval of one score over another; resamples in which the latter is 0 are left out."""
    return interval(np.divide(draws, of, out=np.full_like(draws, np.nan), where=of > 0), confidence)


def without_teacher(arms: Iterable[str], none: str) -> str:
    """Where there is no teacher (stage align) nothing is compared; each arm's own score as Markdown."""
    lines = [f"No comparison: {none}. What each arm answers by itself:", "", "| arm | exact match |", "|---|---:|"]
    for arm in arms:
        lines.append(f"| {arm} | {Scores.read(SCORES / arm / 'scores.json').exact_match:.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    settings = load_settings()
    if none := Absent.reason_at(SCORES / TEACHER_ARM / "scores.json"):
        text = without_teacher(settings.study.arms, none)
        Absent(none=none).write(REPORTS / "compare.json")
        write_text(REPORTS / "compare.md", text)
        write_text(REPORTS / "report.html", f"<!doctype html><title>Align-TI</title><pre>{text}</pre>\n")
        shutil.rmtree(REPORTS / "plots", ignore_errors=True)
        (REPORTS / "plots").mkdir()
        print(f"compare: nothing to do, {none}")
        return

    from tqdm import tqdm

    from components import tracking
    from components.evaluate import report

    with tracking.stage_run(
        "compare", runtime=settings.runtime, params={"resamples": settings.evaluate.bootstrap_resamples}
    ) as run:
        outcomes = read(settings.study.arms)
        comparison = compare(outcomes, settings.evaluate, settings.study.arms)
        written = [comparison.write(REPORTS / "compare.json")]
        with tqdm(total=4, desc="compare", unit="part") as progress:
            for part in report.write(comparison, outcomes, settings.evaluate):
                written += part
                progress.update()
        run.metrics(_tracked(comparison))
        run.tag("best_arm", comparison.order[0])
        for path in written:
            run.artifact(path)
    best = leaders(comparison)
    print(
        f"compare: best arm {listed(best)}, {spoken(comparison.arms[best[0]])} against the teacher's"
        f" {comparison.teacher.exact_match:.1%}; report in {REPORTS / 'report.html'}"
    )


def _tracked(comparison: Comparison) -> dict[str, float]:
    figures = {"teacher/exact_match": comparison.teacher.exact_match}
    for arm, result in comparison.arms.items():
        figures |= {f"{arm}/exact_match": result.exact_match, f"{arm}/train_seconds": result.train_seconds}
        figures |= {f"{arm}/gain_over_{base}": gain.difference for base, gain in result.gains.items()}
    return figures


if __name__ == "__main__":
    exit_from(main)
