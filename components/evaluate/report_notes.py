"""Sentences of the report: largest gaps to the teacher, definitions and limits of the numbers."""

from __future__ import annotations

from statistics import fmean

from components.evaluate import plots
from components.evaluate.headline import join_names, resolution
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
    kinds = plots.differing_kinds(comparison)
    equal_kinds = [
        f"{plain(kind)} {md.percent(comparison.teacher.per_kind[kind])}%" for kind in comparison.kinds if kind not in kinds
    ]
    text = (
        f"Left out are {len(equal_kinds)} of {len(comparison.kinds)} kinds, in which all are equal: {join_names(equal_kinds)}."
    )
    text = "" if not equal_kinds else text if kinds else f"All are equal in every kind: {join_names(equal_kinds)}."
    scores = {kind: [arm.per_kind[kind] for arm in comparison.arms.values()] for kind in kinds}
    gaps = {kind: comparison.teacher.per_kind[kind] - fmean(arm_scores) for kind, arm_scores in scores.items()}
    worst_kind = max(gaps, key=gaps.__getitem__, default=None)
    if worst_kind is None or gaps[worst_kind] <= 0:
        return text
    low, high = map(md.percent, (min(scores[worst_kind]), max(scores[worst_kind])))
    arm_range = low if low == high else f"{low} to {high}"
    teacher_share = md.percent(comparison.teacher.per_kind[worst_kind])
    return (
        f"Arms fall furthest behind the teacher in {plain(worst_kind)}: it has {teacher_share}%, they have {arm_range}%. {text}"
    ).strip()


def fingerprint_notes(comparison: Comparison) -> list[str]:
    """Sentence for each arm whose fingerprint differs from the teacher's, with the differences."""
    return [
        f"{arm} was measured otherwise than the teacher ({'; '.join(result.differs)}), so its score compares with nothing here."
        for arm, result in comparison.arms.items()
        if result.differs
    ]


def published_source(comparison: Comparison) -> str:
    """Recipe and machine of the published runs, in one or two sentences; empty without any."""
    published = comparison.published
    if published is None:
        return ""
    text = f"Runs of recipe {published.recipe} on {published.machine}."
    return f"{text} Your params differ from the recipe in {published.differing} values." if published.differing else text


def notes(comparison: Comparison) -> list[str]:
    """Notes on method, measures and limits of the numbers."""
    return [
        *fingerprint_notes(comparison),
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
