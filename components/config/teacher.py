"""Schema of params/teacher.yaml."""

from __future__ import annotations

from pydantic import Field

from components.config.fields import PositiveFloat, PositiveInt, Ratio, Seed, Strict


class TeacherSettings(Strict):
    """Rule: best exact match among the candidates within the limits; among those within `tie_margin`, the smallest."""

    seed: Seed
    samples: PositiveInt = Field(description="validation samples that each candidate answers")
    min_exact_match: Ratio | None
    max_parameters: PositiveInt | None
    max_seconds_per_1000: PositiveFloat | None
    max_memory_mib: PositiveFloat | None
    tie_margin: Ratio
