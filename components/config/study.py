"""Schema of params/study.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from components.align_ti import terms
from components.config.distill import Iva, Tpa
from components.config.fields import ArmName, Name, NonNegative, PositiveInt, Seed, Share, Strict
from components.config.loss_terms import Divergence, Weights, WithTerms, as_tuples
from components.records.paths import TEACHER_ARM


class Rollouts(Strict):
    """Answers that the student itself writes in training, to a sample's first question, in place of the data's."""

    share: Annotated[float, Field(gt=0, le=1)] = Field(description="GKD's lambda: of the samples, drawn anew in each epoch")
    temperature: NonNegative = Field(description="that tokens are drawn at; 0: greedy. The divergence has its own")
    top_p: Share | None = Field(description="draw among the fewest tokens whose probabilities reach this; null: among all")
    max_new_tokens: PositiveInt = Field(description="an answer that has not ended by then is cut off, and trained on as it is")
    reuse: PositiveInt = Field(description="epochs that an answer serves")


class Arm(WithTerms):
    """One student of the study. `iva`, `tpa`, `divergence`, other terms' blocks: null means as in `params/distill.yaml`."""

    weights: Weights
    student: Name
    seed: Seed
    iva: Iva | None = None
    tpa: Tpa | None = None
    divergence: Divergence | None = None
    steps: PositiveInt | None = Field(
        default=None, exclude_if=lambda value: value is None, description="in place of params/distill.yaml's"
    )
    answers: Literal["teacher"] | None = Field(
        default=None, exclude_if=lambda value: value is None, description="teacher: those of `teacher_answers`, not the data's"
    )
    rollouts: Rollouts | None = Field(default=None, exclude_if=lambda value: value is None)

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """Of the terms that weigh something, as their dataclasses take them. Of an arm that Settings.arm has filled in."""
        assert self.iva is not None and self.tpa is not None
        own: dict[str, dict[str, Any]] = {
            "iva": {
                "uniform": self.iva.weighting == "uniform",
                "by": self.iva.weighting if self.iva.weighting in ("entropy", "divergence") else None,
                "divergence": _dumped(self.iva.divergence),
                "change": None if self.iva.of_another else self.iva.change,
                "rows": self.iva.rows,
            },
            "tpa": {"divergence": _dumped(self.tpa.divergence)},
        }
        return {name: as_tuples((own | self.blocks).get(name, {})) for name in self.weights}

    @property
    def needs(self) -> dict[str, terms.Needs]:
        """What each of them has the step compute."""
        return {name: terms.term_class(name)(**options).needs for name, options in self.options.items()}

    @property
    def needs_layer(self) -> bool:
        """Whether it weighs visual tokens by what the layer search finds."""
        assert self.iva is not None
        return self.iva.weighting in ("irs", "searched") and any(needs.attention for needs in self.needs.values())


def _dumped(divergence: Divergence | None) -> dict[str, Any] | None:
    return None if divergence is None else divergence.model_dump()


class StudySettings(Strict):
    arms: dict[ArmName, Arm] = Field(min_length=1)

    @model_validator(mode="after")
    def _not_the_teacher(self) -> StudySettings:
        if TEACHER_ARM in self.arms:
            raise ValueError(f"arms.{TEACHER_ARM}: the name is taken by the teacher's own scores")
        return self
