"""Schema of params/evaluate.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from components.config.fields import Name, NoRepeats, PositiveInt, Seed, Strict


class EvaluateSettings(Strict):
    split: Literal["val", "test"]
    batch_size: PositiveInt
    max_new_tokens: PositiveInt
    bootstrap_resamples: PositiveInt
    confidence: Annotated[float, Field(gt=0, lt=1)]
    seed: Seed
    scorers: Annotated[list[Literal["anls", "relaxed_accuracy", "choice"]], NoRepeats] = Field(
        description="beside exact match and token F1, of one's own data (components/evaluate/scorers.py)"
    )
    baselines: Annotated[list[Name], NoRepeats] = Field(description="arms that every other arm's gain is stated against")
    examples: PositiveInt = Field(description="samples where arms disagree, shown in the report")
