"""Records of stage `search_layer`."""

from __future__ import annotations

from typing import Literal, Self

from components.records.paths import IRS
from components.records.record import Absent, Record

Attention = Literal["mean", "centred"]  # mean over heads and rows | the same less the background over all instructions
Rows = Literal["all", "words"]  # instruction rows: all, or the question's words without the template's tokens
Interval = tuple[float, float]


class Picked(Record):
    """Layer, weighting and rows for the visual tokens where params/distill.yaml asks for `weighting: searched`."""

    rule: Literal["irs", "pointing", "given"]  # rule of params/irs.yaml
    layer: int
    weighting: Attention
    rows: Rows
    runner_up: tuple[int, Attention, Rows] | None  # under `pointing`: the second best layer, weighting, rows
    separated: bool  # lead over the runner-up above 1.96 standard errors of the paired difference

    @property
    def described(self) -> str:
        rows = "all instruction rows" if self.rows == "all" else "the question's words"
        return f"layer {self.layer}, {self.weighting} attention over {rows}"


class View(Record):
    """IRS and pointing per layer, for one weighting and kind of rows."""

    weighting: Attention
    rows: Rows
    irs: list[float]
    irs_standard_error: list[float]  # over images
    pointing: list[float]  # share of the weights on the question's region; empty without known regions
    pointing_ci95: list[Interval]  # over images
    equal: list[int]  # instructions with zero attention left, whose visual weights are uniform


class Region(Record):
    """Image regions behind `pointing`: those that the questions are about."""

    images: int
    questions: int
    equal: float  # share of uniform weights on the region
    equal_ci95: Interval


class Background(Record):
    """Background attention per layer: the attention map's mean over images and instructions."""

    rows: Rows
    most: list[float]  # largest share of one position
    sinks: list[list[int]]  # positions above 5 times the uniform share
    on_sinks: list[float]  # total share of the sinks


class LayerChoice(Record):
    """artifacts/irs/layer.json: the layer of the highest IRS (mean attention over all rows, as in the paper), and the pick of
    the rule in params/irs.yaml."""

    layer: int
    irs: list[float]  # per layer
    standard_error: list[float]  # per layer, over images
    separated: bool  # lead over the runner-up above 1.96 standard errors of the paired difference
    runner_up: int
    images: int
    pairs: int
    picked: Picked
    views: list[View]
    region: Region | None  # None: no known regions, or unknown positions of visual tokens
    grids: list[str]  # grids of visual tokens found in the images
    backgrounds: list[Background]  # empty if the grids differ

    @classmethod
    def read_if_searched(cls) -> Self | None:
        """Layer choice of this folder; None if no image has enough instructions for a search."""
        return None if Absent.reason_at(IRS / "layer.json") else cls.read(IRS / "layer.json")
