"""Schema of params/teacher.yaml."""

from __future__ import annotations

from pydantic import Field

from components.config.fields import PositiveFloat, PositiveInt, Ratio, Seed, Strict


class TeacherSettings(Strict):
    """Selection rule: best exact match of the candidates within the limits; of those within `tie_margin`, the smallest."""

    seed: Seed
    samples: PositiveInt = Field(description="validation samples that each candidate answers")
    min_exact_match: Ratio | None
    max_parameters: PositiveInt | None
    max_seconds_per_1000: PositiveFloat | None
    max_memory_mib: PositiveFloat | None
    tie_margin: Ratio
