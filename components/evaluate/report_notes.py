"""Sentences of the report: largest gaps to the teacher, definitions and limits of the numbers."""

from __future__ import annotations

from statistics import fmean

from components.evaluate import plots
from components.evaluate.headline import listed, resolution
from components.evaluate.report_tables import plain
from components.evaluate.scorers import SCORERS
from components.records.compare import Comparison
from components.report import markdown as md

OTHER_MEASURES = (
    "Token F1: the words that answer and reference share, counted as in SQuAD. Nats per reference token: the model's negative"
    " log-likelihood of the reference, its end included. KL: KL(teacher || model) at each of these tokens, over the whole"
    " vocabulary."
)
ONE_SEED = (
    "The intervals measure the noise of the test sample: what would change with other images and questions. Each arm is one"
    " training run with one seed, so they do not measure what would change with another seed: a difference larger than the"
    " noise of the test sample may still be smaller than that between two seeds."
)
OVER_SEEDS = (
    "The intervals measure what would change with other images and questions and with other seeds. How much seeds of one arm"
    " differ is taken to be the same for all arms, an arm of one seed included, and its uncertainty widens the intervals as in"
    " Student's t."
)
PACE = (
    "Seconds per step are the median over an arm's steps, which other work on the machine sways less than the wall clock of the"
    " whole training; arms compare by them where they trained on one machine."
)


def by_kind(comparison: Comparison) -> str:
    """Kind with the largest mean gap to the teacher, and the kinds that the table leaves out."""
    shown = plots.telling(comparison)
    alike = [
        f"{plain(kind)} {md.percent(comparison.teacher.per_kind[kind])}%" for kind in comparison.kinds if kind not in shown
    ]
    words = f"Left out are {len(alike)} of {len(comparison.kinds)} kinds, in which all are equal: {listed(alike)}."
    words = "" if not alike else words if shown else f"All are equal in every kind: {listed(alike)}."
    scores = {kind: [arm.per_kind[kind] for arm in comparison.arms.values()] for kind in shown}
    behind = {kind: comparison.teacher.per_kind[kind] - fmean(found) for kind, found in scores.items()}
    furthest = max(behind, key=behind.__getitem__, default=None)
    if furthest is None or behind[furthest] <= 0:
        return words
    low, high, taught = map(md.percent, (min(scores[furthest]), max(scores[furthest]), comparison.teacher.per_kind[furthest]))
    theirs = low if low == high else f"{low} to {high}"
    return f"Arms fall furthest behind the teacher in {plain(furthest)}: it has {taught}%, they have {theirs}%. {words}".strip()


def unlike(comparison: Comparison) -> list[str]:
    """Sentence for each arm whose fingerprint differs from the teacher's, with the differences."""
    return [
        f"{arm} was measured otherwise than the teacher ({'; '.join(result.differs)}), so its score compares with nothing here."
        for arm, result in comparison.arms.items()
        if result.differs
    ]


def published_by(comparison: Comparison) -> str:
    """Recipe and machine of the published runs, in one or two sentences; empty without any."""
    found = comparison.published
    if found is None:
        return ""
    words = f"Runs of recipe {found.recipe} on {found.machine}."
    return f"{words} Your params differ from the recipe in {found.differing} values." if found.differing else words


def notes(comparison: Comparison) -> list[str]:
    """Notes on method, measures and limits of the numbers."""
    return [
        *unlike(comparison),
        comparison.method,
        *filter(None, [resolution(comparison)]),
        OTHER_MEASURES,
        *(f"{scorer.title.capitalize()}: {scorer.note}." for name, scorer in SCORERS.items() if name in comparison.measures),
        OVER_SEEDS if comparison.repeated else ONE_SEED,
        f"Where two arms do not differ at all, one interval in {round(1 / (1 - comparison.confidence))} still excludes zero by"
        f" chance. p (Holm) accounts for the {md.counted(len(comparison.pairs), 'pair')} here.",
        "An arm that answers all questions of a kind right, or none, has an interval of no width there: the draws hold nothing"
        " that the sample does not.",
        f"{PACE} So is peak memory.",
    ]
