"""Selection rule: the best exact match within the limits; among candidates within the tie margin, the smallest."""

from __future__ import annotations

from collections.abc import Sequence

from components.config.teacher import TeacherSettings
from components.errors import ModelError
from components.records.teacher import Candidate

ROUNDING = 1e-9  # tolerance of comparisons: 0.81 - 0.80 is slightly more than 0.01 in floats


def limits_broken(candidate: Candidate, limits: TeacherSettings) -> list[str]:
    """Messages for each limit of `params/teacher.yaml` that `candidate` breaks; a value equal to the limit passes."""
    broken = []
    if limits.min_exact_match is not None and candidate.exact_match < limits.min_exact_match - ROUNDING:
        broken.append(f"exact match {candidate.exact_match:.3f} is below min_exact_match {limits.min_exact_match}")
    if limits.max_parameters is not None and candidate.parameters > limits.max_parameters:
        broken.append(f"{candidate.parameters:,} parameters are above max_parameters {limits.max_parameters:,}")
    if limits.max_seconds_per_1000 is not None and candidate.seconds_per_1000 > limits.max_seconds_per_1000:
        broken.append(
            f"{candidate.seconds_per_1000:.4g} s per 1,000 samples are above max_seconds_per_1000 {limits.max_seconds_per_1000}"
        )
    if limits.max_memory_mib is not None and candidate.memory_mib > limits.max_memory_mib:
        broken.append(f"{candidate.memory_mib:.4g} MiB are above max_memory_mib {limits.max_memory_mib}")
    return broken


def choose(candidates: Sequence[Candidate], limits: TeacherSettings) -> tuple[str, str]:
    """Name of the selected candidate, and the reason in one sentence; independent of the order of `candidates`.

    Ties of equal size go to the higher exact match, then to the first name.

    Raises ModelError if every candidate breaks a limit, listing the broken limits per candidate.
    """
    broken = {c.name: limits_broken(c, limits) for c in sorted(candidates, key=lambda c: c.name)}
    eligible = [c for c in candidates if not broken[c.name]]
    if not eligible:
        summary = "\n  ".join(f"{name}: {'; '.join(limits)}" for name, limits in broken.items())
        raise ModelError(
            f"no teacher candidate is within the limits of params/teacher.yaml; loosen a limit, or train longer:\n  {summary}"
        )
    best = min(eligible, key=lambda c: (-c.exact_match, c.parameters, c.name))
    tied = [c for c in eligible if best.exact_match - c.exact_match <= limits.tie_margin + ROUNDING]
    chosen = min(tied, key=lambda c: (c.parameters, -c.exact_match, c.name))
    return chosen.name, _reason(chosen, best, len(tied), len(eligible), [name for name, messages in broken.items() if messages])


def _reason(chosen: Candidate, best: Candidate, tied: int, eligible: int, refused: Sequence[str]) -> str:
    if eligible == 1:
        reason = f"is the only candidate within the limits, with {chosen.exact_match:.1%} exact match"
    elif tied == 1:
        reason = f"has the best exact match, {chosen.exact_match:.1%}, of the {eligible} candidates within the limits"
    elif chosen is best:
        reason = (
            f"has the best exact match, {chosen.exact_match:.1%}, of the {eligible} candidates within the limits, and none of "
            f"the {tied} that count as equal is smaller"
        )
    else:
        reason = (
            f"is the smallest of the {tied} candidates that count as equal: {chosen.exact_match:.1%} exact match against "
            f"{best.exact_match:.1%} for {best.name}"
        )
    refused_note = f"; refused: {', '.join(refused)}" if refused else ""
    return f"{chosen.name} ({chosen.parameters:,} parameters) {reason}{refused_note}."
