"""Headline of the comparison: detectable difference first, then the leading arms and their margin."""

from __future__ import annotations

import math
from statistics import variance

from components.records.compare import Comparison, PublishedRuns, TeacherResult
from components.records.paths import TEACHER_ARM


def headline(comparison: Comparison) -> str:
    """Resolution of the sample, then the leading arms."""
    if not any(result.exact_match for result in comparison.results.values()):
        return f"Of {comparison.n:,} questions nobody, the teacher included, answers one right: the scores tell no arms apart."
    return f"{resolution(comparison)} {leading(comparison)}".strip()


def resolution(comparison: Comparison) -> str:
    """Detectable difference in exact match with these questions and seeds, in a sentence or two; empty for one arm alone, and
    if most pairs answer alike."""
    found = comparison.exact_match
    if not found.noise or not found.detectable:
        return ""
    counts = sorted({len(arm.runs) for arm in comparison.arms.values()})
    trained = "one training run" if counts == [1] else f"{' or '.join(map(str, counts))} training runs"
    words = (
        f"With {comparison.n:,} questions about {comparison.images:,} images and {trained} per arm, a true difference of"
        f" {100 * found.detectable:.1f} points between two arms is seen four times in five, and one below"
        f" {100 * found.noise:.1f} points may be chance (median over pairs, {comparison.confidence:.0%})"
    )
    if found.spread is None:
        expected = _published_spread(comparison.published)
        seeds = f": seeds of one arm vary by {100 * expected:.1f} points in the published runs" if expected is not None else ""
        return f"{words}; what another seed would change is not counted in{seeds}."
    return f"{words}. Seeds of one arm vary by {100 * found.spread:.1f} points (standard deviation), which is counted in."


def _published_spread(published: PublishedRuns | None) -> float | None:
    """Standard deviation between seeds of one arm, pooled over arms; None if no arm was published with several."""
    scores = published.scores if published else {}
    groups = [group for arm, group in scores.items() if arm != TEACHER_ARM and len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(sum((len(group) - 1) * variance(group) for group in groups) / freedom) if groups else None


def leading(comparison: Comparison) -> str:
    """Sentences on the leading arms: leads that exceed the noise, and those that hold after Holm's correction."""
    best = leaders(comparison)
    leads = {pair.against: pair for pair in comparison.pairs if pair.arm == best[0]}
    others = [arm for arm in comparison.order[len(best) :] if not leads[arm].differs]
    verb = "answers" if len(best) == 1 else "each answer"
    words = f"{listed(best)} {verb} {spoken(comparison.arms[best[0]])} of the {comparison.split} questions right"
    if len(best) == len(comparison.order):
        return f"{words}."
    words += f", the most of {len(comparison.order)} arms."
    if not others:
        return f"{words} No other arm was measured in the same way, so none compares with it."
    beyond = [arm for arm in others if leads[arm].larger_than_noise]
    within = [arm for arm in others if not leads[arm].larger_than_noise]
    lead = "Its lead" if len(best) == 1 else f"The lead of {best[0]}"
    larger = f"larger than the noise of {noise_of(comparison)}"
    if not beyond:
        over = "no other arm is" if len(others) > 1 else f"{others[0]} is not"
        return f"{words} {lead} over {over} {larger}."
    words += f" {lead} over {listed(beyond) if within else 'every other arm'} is {larger}"
    words += f"; over {listed(within)} it is not." if within else "."
    if len(comparison.pairs) == 1:
        return words  # nothing to adjust for
    still = [arm for arm in beyond if leads[arm].p_holm < 1 - comparison.confidence]
    held = "all of them" if still == beyond else listed(still) if still else "none of them"
    return f"{words} Adjusted for {len(comparison.pairs)} pairs (Holm), this holds over {held}."


def noise_of(comparison: Comparison) -> str:
    """Sources of noise that the intervals account for."""
    return "the test sample and the seeds" if comparison.repeated else "the test sample"


def leaders(comparison: Comparison) -> list[str]:
    """Arms with the best score; several if they tie."""
    best = comparison.arms[comparison.order[0]].exact_match
    return [arm for arm in comparison.order if comparison.arms[arm].exact_match == best]


def standing(comparison: Comparison) -> str:
    """Ranking of the arms and the teacher's score, with their intervals."""
    order = ", ".join(f"{arm} {spoken(comparison.arms[arm])}" for arm in comparison.order)
    return (
        f"On {comparison.n:,} {comparison.split} questions about {comparison.images:,} images the order is {order};"
        f" the teacher has {spoken(comparison.teacher)}. In brackets {comparison.confidence:.0%} intervals."
    )


def spoken(result: TeacherResult) -> str:
    low, high = result.ci95
    return f"{result.exact_match:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
