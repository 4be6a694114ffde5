"""Schema of params/irs.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.config.fields import PositiveInt, Seed, Strict
from components.records.irs import Attention, Rows


class IrsSettings(Strict):
    seed: Seed
    images: Annotated[int, Field(ge=2)] = Field(description="training-split images with two or more instructions")
    instructions_per_image: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt
    overlays: PositiveInt = Field(description="pictures of where two instructions look")
    rule: Literal["irs", "pointing", "given"] = Field(description="what picks the weights of `weighting: searched`")
    layer: Annotated[int, Field(ge=0)] | None = Field(description="for rule: given")
    weighting: Attention | None = Field(description="mean, as in the paper, or centred; null: whichever points best")
    instruction_rows: Rows | None = Field(description="all, or the question's words; null: whichever point best")

    @model_validator(mode="after")
    def _check_rule_fields(self) -> IrsSettings:
        if (self.rule == "given") != (self.layer is not None):
            raise ValueError("`layer` is for `rule: given`, and only for it")
        if self.rule != "pointing" and None in (self.weighting, self.instruction_rows):
            raise ValueError(f"`rule: {self.rule}` needs `weighting` and `instruction_rows`; null is for `rule: pointing`")
        return self
