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
    contrast = comparison.exact_match
    if not contrast.noise or not contrast.detectable:
        return ""
    counts = sorted({len(arm.runs) for arm in comparison.arms.values()})
    trained = "one training run" if counts == [1] else f"{' or '.join(map(str, counts))} training runs"
    text = (
        f"With {comparison.n:,} questions about {comparison.images:,} images and {trained} per arm, a true difference of"
        f" {100 * contrast.detectable:.1f} points between two arms is seen four times in five, and one below"
        f" {100 * contrast.noise:.1f} points may be chance (median over pairs, {comparison.confidence:.0%})"
    )
    if contrast.spread is None:
        published_spread = _published_spread(comparison.published)
        seeds = (
            f": seeds of one arm vary by {100 * published_spread:.1f} points in the published runs"
            if published_spread is not None
            else ""
        )
        return f"{text}; what another seed would change is not counted in{seeds}."
    return f"{text}. Seeds of one arm vary by {100 * contrast.spread:.1f} points (standard deviation), which is counted in."


def _published_spread(published: PublishedRuns | None) -> float | None:
    """Standard deviation between seeds of one arm, pooled over arms; None if no arm was published with several."""
    scores = published.scores if published else {}
    groups = [group for arm, group in scores.items() if arm != TEACHER_ARM and len(group) > 1]
    degrees = sum(len(group) - 1 for group in groups)
    return math.sqrt(sum((len(group) - 1) * variance(group) for group in groups) / degrees) if groups else None


def leading(comparison: Comparison) -> str:
    """Sentences on the leading arms: leads that exceed the noise, and those that hold after Holm's correction."""
    leading_arms = leaders(comparison)
    leads = {pair.against: pair for pair in comparison.pairs if pair.arm == leading_arms[0]}
    rest = comparison.order[len(leading_arms) :]
    others = [arm for arm in rest if not leads[arm].differs]
    verb = "answers" if len(leading_arms) == 1 else "each answer"
    score = format_score(comparison.arms[leading_arms[0]])
    text = f"{join_names(leading_arms)} {verb} {score} of the {comparison.split} questions right"
    if not rest:
        return f"{text}."
    text += f", the most of {len(comparison.order)} arms."
    if not others:
        return f"{text} No other arm was measured in the same way, so none compares with it."
    alike = "" if others == rest else " measured in the same way"
    above_noise = [arm for arm in others if leads[arm].larger_than_noise]
    below_noise = [arm for arm in others if not leads[arm].larger_than_noise]
    lead = "Its lead" if len(leading_arms) == 1 else f"The lead of {leading_arms[0]}"
    larger = f"larger than the noise of {noise_of(comparison)}"
    if not above_noise:
        over = f"no other arm{alike} is" if len(others) > 1 else f"{others[0]} is not"
        return f"{text} {lead} over {over} {larger}."
    text += f" {lead} over {join_names(above_noise) if below_noise else f'every other arm{alike}'} is {larger}"
    text += f"; over {join_names(below_noise)} it is not." if below_noise else "."
    if len(comparison.pairs) == 1:
        return text  # nothing to adjust for
    significant = [arm for arm in above_noise if leads[arm].p_holm < 1 - comparison.confidence]
    significant_names = (
        "all of them" if significant == above_noise else join_names(significant) if significant else "none of them"
    )
    return f"{text} Adjusted for {len(comparison.pairs)} pairs (Holm), this holds over {significant_names}."


def noise_of(comparison: Comparison) -> str:
    """Sources of noise that the intervals account for."""
    return "the test sample and the seeds" if comparison.repeated else "the test sample"


def leaders(comparison: Comparison) -> list[str]:
    """Arms with the best score; several if they tie."""
    best = comparison.arms[comparison.order[0]].exact_match
    return [arm for arm in comparison.order if comparison.arms[arm].exact_match == best]


def ranking(comparison: Comparison) -> str:
    """Ranking of the arms and the teacher's score, with their intervals."""
    order = ", ".join(f"{arm} {format_score(comparison.arms[arm])}" for arm in comparison.order)
    return (
        f"On {comparison.n:,} {comparison.split} questions about {comparison.images:,} images the order is {order};"
        f" the teacher has {format_score(comparison.teacher)}. In brackets {comparison.confidence:.0%} intervals."
    )


def format_score(result: TeacherResult) -> str:
    low, high = result.ci95
    return f"{result.exact_match:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def join_names(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
