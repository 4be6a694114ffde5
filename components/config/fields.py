"""Base and field types of all settings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MIN_TEMPERATURE = 1e-6  # logits divided by much less overflow


def _zero_or_temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"must be 0 (greedy) or at least {MIN_TEMPERATURE}")
    return value


def _without_repeats(values: list[Any]) -> list[Any]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} stands more than once")
    return values


Ratio = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Temperature = Annotated[float, Field(ge=MIN_TEMPERATURE)]
SamplingTemperature = Annotated[float, Field(ge=0), AfterValidator(_zero_or_temperature)]
Seed = Annotated[int, Field(ge=0, lt=2**43)]  # times 1,000,003 (distill/sampler.py) it fits torch's seed
NonNegative = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=64)]
ArmName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]  # no dots: DVC reads `arms.NAME`
IntRange = Annotated[tuple[int, int], Field(strict=False, description="[lowest, highest], both included")]
FloatRange = Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False, description="[lowest, highest]")]
NoRepeats = AfterValidator(_without_repeats)  # of a list
Byte = Annotated[int, Field(ge=0, le=255)]
Rgb = Annotated[tuple[Byte, Byte, Byte], Field(strict=False)]


class Strict(BaseModel):
    """Base model of settings: unknown keys, NaN and silent conversions (`"3"` for 3) are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
