"""Records of stage `compare`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from components.records.evaluate import YesNo
from components.records.paths import TEACHER_ARM, Split
from components.records.record import Record


class Difference(Record):
    """A measure of `arm` minus that of `against`, over the same samples; `p_holm` is adjusted for all pairs of arms."""

    arm: str
    against: str
    difference: float
    ci95: tuple[float, float]
    p_value: float
    p_holm: float
    p_mcnemar: float | None = None  # McNemar's exact p over the yes/no questions; None if not tested
    # Differing fingerprint fields: with any, the difference is not due to the arms alone.
    differs: list[str] = Field(default_factory=list)

    @property
    def larger_than_noise(self) -> bool:
        """True if the interval excludes zero and the fingerprints agree."""
        return not self.differs and not self.ci95[0] <= 0 <= self.ci95[1]


class Contrast(Record):
    """Pairwise differences by one measure, and the sample's resolution: medians over pairs; None for one arm."""

    pairs: list[Difference]  # each arm minus each ranked below it by exact match
    noise: float | None  # smallest significant gap between two arms
    detectable: float | None  # minimum detectable difference at 80% power
    spread: float | None  # standard deviation between runs that differ only in seed; None: one run per arm

    def gain(self, arm: str, baseline: str) -> Difference | None:
        """Difference `arm` minus `baseline`, in either rank order; None if they are no pair."""
        pair = next((p for p in self.pairs if {p.arm, p.against} == {arm, baseline}), None)
        if pair is None or pair.arm == arm:
            return pair
        low, high = pair.ci95
        reverse = {"difference": 0.0 - pair.difference, "ci95": (0.0 - high, 0.0 - low)}
        return pair.model_copy(update={"arm": arm, "against": baseline, **reverse})


class Estimate(Record):
    value: float
    ci95: tuple[float, float]
    per_kind: dict[str, float]


class TeacherResult(Record):
    """Exact match with its interval, over all samples and as the mean over kinds; other measures over all samples."""

    exact_match: float
    ci95: tuple[float, float]
    average: float  # mean over kinds, each counting the same
    average_ci95: tuple[float, float]
    per_kind: dict[str, float]
    per_kind_ci95: dict[str, tuple[float, float]]
    yes_no: dict[str, YesNo]  # by kind
    yes_no_overall: YesNo | None = None  # over all yes/no kinds; None without any
    measures: dict[str, Estimate]  # token F1, nats and KL per token, scorers (components/evaluate/measures.py)
    # Fields that differ from the teacher's fingerprint; with any, the score is not comparable here.
    differs: list[str] = Field(default_factory=list)


class ArmResult(TeacherResult):
    """Means over the arm's runs, which differ only in seed, with intervals of those means."""

    # Settings that vary between arms, by path in params/study.yaml (`weights.kd`); None: as in params/distill.yaml.
    settings: dict[str, Any] = Field(default_factory=dict)
    runs: dict[str, float]  # name in params/study.yaml -> exact match; the first gives the arm its name
    share_of_teacher: float | None  # exact match over the teacher's; None where the teacher has none
    share_ci95: tuple[float, float] | None
    gains: dict[str, Difference]  # over each baseline of params/evaluate.yaml
    train_seconds: float  # mean over runs
    step_seconds: float  # mean over runs of the median per run
    peak_memory_mib: float  # maximum over runs
    device: str
    steps: int


class PublishedRuns(Record):
    """Runs of a shipped recipe on the publisher's machine (components/evaluate/published_runs.yaml)."""

    recipe: str
    differing: int  # values of params/ that differ from the recipe's
    machine: str
    scores: dict[str, Annotated[list[float], Field(min_length=1)]]  # teacher and arms -> exact match, one number per seed


class Comparison(Record):
    """reports/compare.json"""

    headline: str  # detectable difference, then the leading arms
    standing: str  # ranking of all arms with their intervals, as a sentence
    split: Split
    n: int  # samples
    images: int
    kinds: dict[str, int]  # samples per kind
    confidence: float  # confidence of every interval here, from params/evaluate.yaml
    resamples: int
    method: str
    teacher: TeacherResult
    arms: dict[str, ArmResult]  # results in the order of params/study.yaml
    order: list[str]  # arms from the best down
    exact_match: Contrast
    measures: dict[str, Contrast]
    published: PublishedRuns | None = None  # published runs of the recipe nearest to params/

    @property
    def results(self) -> dict[str, TeacherResult]:
        """Results of the teacher, then of the arms from the best down."""
        return {TEACHER_ARM: self.teacher, **{arm: self.arms[arm] for arm in self.order}}

    @property
    def pairs(self) -> list[Difference]:
        """Differences of each arm and each ranked below it, by exact match."""
        return self.exact_match.pairs

    @property
    def repeated(self) -> bool:
        """True if some arm has several seeds, so that intervals include the seed error."""
        return self.exact_match.spread is not None
