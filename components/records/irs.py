"""Records of stage `search_layer`."""

from __future__ import annotations

from typing import Literal, Self

from components.records.paths import IRS
from components.records.record import Absent, Record

Attention = Literal["mean", "centred"]  # over heads and rows, as it is | less what the layer attends to whatever is asked
Rows = Literal["all", "words"]  # instruction rows: all, or the question's own without the template's
Interval = tuple[float, float]


class Picked(Record):
    """Layer, weighting and rows for the visual tokens where params/distill.yaml asks for `weighting: searched`."""

    rule: Literal["irs", "pointing", "given"]  # rule of params/irs.yaml
    layer: int
    weighting: Attention
    rows: Rows
    runner_up: tuple[int, Attention, Rows] | None  # under `pointing`: the second best layer, weighting, rows
    separated: bool  # the lead over it is more than 1.96 standard errors of their paired difference

    @property
    def described(self) -> str:
        rows = "all instruction rows" if self.rows == "all" else "the question's words"
        return f"layer {self.layer}, {self.weighting} attention over {rows}"


class View(Record):
    """Per layer, for one weighting and kind of rows."""

    weighting: Attention
    rows: Rows
    irs: list[float]
    irs_standard_error: list[float]  # over images
    pointing: list[float]  # share of the weights on the asked region; empty where no region is known
    pointing_ci95: list[Interval]  # over images
    equal: list[int]  # instructions without any attention left, whose image's tokens weigh the same


class Region(Record):
    """The asked regions that `pointing` was measured on."""

    images: int
    questions: int
    equal: float  # share of equal weights on the region
    equal_ci95: Interval


class Background(Record):
    """Per layer, where the attention goes whatever is asked: its mean over images and instructions."""

    rows: Rows
    most: list[float]  # share of the one position that takes most
    sinks: list[list[int]]  # positions that take more than 5 times an equal share
    on_sinks: list[float]  # share of them together


class LayerChoice(Record):
    """artifacts/irs/layer.json: the layer of the highest IRS (mean attention over all rows, as in the paper), and what the rule
    of params/irs.yaml picks."""

    layer: int
    irs: list[float]  # per layer
    standard_error: list[float]  # per layer, over images
    separated: bool  # is the winner's lead over the runner-up more than 1.96 standard errors of their paired difference?
    runner_up: int
    images: int
    pairs: int
    picked: Picked
    views: list[View]
    region: Region | None  # None: no question's region is known, or not where the visual tokens lie
    grids: list[str]  # grids of visual tokens found in the images
    backgrounds: list[Background]  # none where the grids differ

    @classmethod
    def found(cls) -> Self | None:
        """Layer choice of this folder; None where no layer could be searched for: no image has enough instructions."""
        return None if Absent.reason_at(IRS / "layer.json") else cls.read(IRS / "layer.json")
