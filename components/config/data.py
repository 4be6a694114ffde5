"""Schema of params/data.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from components.config.fields import (
    FloatRange,
    IntRange,
    Name,
    NonNegative,
    PositiveFloat,
    PositiveInt,
    Ratio,
    Rgb,
    Seed,
    Share,
    Strict,
)


class SplitSizes(Strict):
    train: PositiveInt
    val: PositiveInt
    test: PositiveInt


class Augmentation(Strict):
    """Random augmentation of one digit; each value is uniform over its range."""

    shift_px: NonNegative = Field(description="largest displacement along each axis, pixels of the composed image")
    scale: FloatRange = Field(description="size relative to the cell")
    rotation_deg: NonNegative = Field(description="largest rotation to either side, degrees")
    brightness: FloatRange = Field(description="share of the colour's full brightness")


class DigitsGrid(Strict):
    """The visual question set composed from UCI handwriting (`source: digits`)."""

    grid: Annotated[int, Field(gt=0, le=9)] = Field(description="cells per side")
    cell_px: PositiveInt = Field(description="pixels per side of a cell")
    filled: IntRange = Field(description="number of cells that hold a digit; the others are empty")
    classes: IntRange = Field(description="number of different digits that an image draws from, of the ten")
    colours: IntRange = Field(description="number of different colours that an image draws from, of the palette")
    palette: dict[Annotated[str, Field(pattern=r"^[a-z]+$")], Rgb] = Field(description="colour word -> red, green, blue")
    texture: Ratio = Field(description="largest brightness of the smooth colour clouds behind the digits, share of full")
    noise: Ratio = Field(description="standard deviation of the noise on every pixel, share of full brightness")
    augmentation: Augmentation
    handwriting: SplitSizes = Field(description="raw digit images per split; they sum to at most 1,797")
    images: SplitSizes = Field(description="composed images per split")
    instructions_per_image: SplitSizes = Field(description="questions per composed image, at least 2; train adds two captions")
    turns_per_row: PositiveInt = Field(description="questions in one conversation of the train split, at most")

    @model_validator(mode="after")
    def _check_consistency(self) -> DigitsGrid:
        upper_bounds = {"filled": min(self.grid**2, 18), "classes": 10, "colours": len(self.palette)}
        for field, upper in upper_bounds.items():
            low, high = getattr(self, field)
            if not 1 <= low <= high <= upper:
                raise ValueError(f"{field} {[low, high]} must be [lowest, highest] within 1..{upper}")
        if sum((self.handwriting.train, self.handwriting.val, self.handwriting.test)) > 1797:
            raise ValueError("handwriting splits sum to more than the 1,797 digits of the UCI set")
        if min(self.instructions_per_image.model_dump().values()) < 2:
            raise ValueError("instructions_per_image must be at least 2: IRS compares instructions on one image")
        return self


class HeldOut(Strict):
    """Shares of own images that are not trained on."""

    val: Share = Field(description="share of images that go to the validation split")
    test: Share = Field(description="share of images that go to the test split")

    @model_validator(mode="after")
    def _check_train_share(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError(f"val {self.val} + test {self.test} leave nothing to train on")
        return self


class LlavaFolder(HeldOut):
    """A user's own LLaVA-format JSON / JSONL and image folder (`source: llava`)."""

    annotations: Path = Field(strict=False, description="JSON list or JSONL of {id, image, conversations}")
    images: Path = Field(strict=False, description="folder that the rows' image paths are relative to, or tar files: `x/*.tar`")


class MixtureSource(Strict):
    """Source of a mixture; the ending of `files` gives its format."""

    files: str = Field(
        description="x.json or x.jsonl (LLaVA), x/*.tar (WebDataset), x/*.parquet, or hf://datasets/ORG/NAME@COMMIT/x"
    )
    images: Path | None = Field(strict=False, description="for LLaVA files: their folder of images, or tar files `x/*.tar`")
    weight: PositiveFloat = Field(description="times that each sample stands in an epoch of training, on average")
    licence: str = Field(min_length=1, description="goes into the data card and the student's")


class Mixture(HeldOut):
    """Several sources in one data set (`source: mixture`)."""

    near_duplicates: Literal["report", "drop"] = Field(description="training images that look like an evaluated one")
    evaluation_images: list[Annotated[Path, Field(strict=False)]] = Field(
        description="folders of benchmarks' images, evaluated on as val and test are"
    )
    sources: dict[Name, MixtureSource] = Field(min_length=1)


class DataLimits(Strict):
    max_pixels: PositiveInt = Field(
        le=178_956_970,  # Pillow opens no larger ones
        description="an image with more pixels is quarantined before it is decoded",
    )
    max_image_mib: PositiveFloat = Field(description="an image file that is larger is quarantined before it is read, MiB")
    max_text_chars: PositiveInt = Field(description="characters of all turns of one conversation")
    max_bad_ratio: Ratio = Field(description="share of quarantined rows past which the stage stops")


class DataSettings(Strict):
    source: Literal["digits", "llava", "mixture"]
    seed: Seed
    images_per_shard: PositiveInt
    limits: DataLimits
    digits: DigitsGrid | None
    llava: LlavaFolder | None
    mixture: Mixture | None

    @model_validator(mode="after")
    def _check_source_block(self) -> DataSettings:
        if getattr(self, self.source) is None:
            raise ValueError(f"source is {self.source}, so the block `{self.source}:` must be filled in")
        return self
