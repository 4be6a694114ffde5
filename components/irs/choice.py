"""Choice of the layer: weights of every layer, weighting and kind of rows, scored, and the rule that picks.

Scores per (weighting, rows, layer): IRS, and where questions say which region they ask about, pointing. IRS of centred
weights lies far above 0 for noise too (about 0.7: what is cut off at 0 seldom overlaps), so it compares layers and not
weightings; pointing compares both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from components.config.irs import IrsSettings
from components.errors import DataError, ModelError
from components.irs.centred import centred, shares
from components.irs.regions import Tiling
from components.irs.score import irs_scores, pointing
from components.irs.search import Seen, Z, rank, standard_error
from components.models.collate import decode
from components.records.irs import Attention, Background, Interval, LayerChoice, Picked, Region, Rows, View

SINK = 5  # times an equal share
KINDS: tuple[tuple[Attention, Rows], ...] = (("mean", "all"), ("mean", "words"), ("centred", "all"), ("centred", "words"))


@dataclass(frozen=True)
class Scored:
    """Every layer under one weighting and kind of rows."""

    weighting: Attention
    rows: Rows
    equal: Tensor  # (L,) instructions without any attention left
    irs: Tensor  # (L, X)
    pointing: Tensor | None  # (L, X')

    @property
    def view(self) -> View:
        scores = [] if self.pointing is None else list(self.pointing)
        return View(
            weighting=self.weighting,
            rows=self.rows,
            irs=self.irs.mean(1).tolist(),
            irs_standard_error=[standard_error(layer) for layer in self.irs],
            pointing=[float(layer.mean()) for layer in scores],
            pointing_ci95=[interval(layer) for layer in scores],
            equal=self.equal.tolist(),
        )


def backgrounds(seen: Seen) -> dict[Rows, Tensor]:
    """Per kind of rows (L, Nv), of sum 1: each layer's mean shares over images and instructions. Images have one grid."""
    return {rows: shares(attention.double()).mean((1, 2)).float() for rows, attention in seen.attention.items()}


def scored(seen: Seen, shared: dict[Rows, Tensor], region: Tensor | None) -> Iterator[Scored]:
    """All `KINDS`. Where there is no `shared` background, an instruction's is the mean over the image's others.

    Args:
        region: (X, I, Nv) as for `pointing`; None where it is not known.
    """
    own = torch.arange(next(iter(seen.attention.values())).shape[-1]) < seen.tokens[:, None]  # (X, Nv)
    equal = own / own.sum(-1, keepdim=True).double()
    for weighting, rows in KINDS:
        attention = seen.attention[rows].double()
        if weighting == "centred":
            attention = centred(attention, shared[rows][:, None, None].double() if shared else others(attention))
        nothing = attention.sum(-1) == 0
        attention = torch.where(nothing[..., None], equal[:, None], attention)
        points = None if region is None else pointing(shares(attention), region)
        yield Scored(weighting, rows, nothing.sum((1, 2)), irs_scores(attention)[1], points)


def others(attention: Tensor) -> Tensor:
    """(..., I, Nv): for each instruction the mean shares of the image's other ones."""
    found = shares(attention)
    return (found.sum(-2, keepdim=True) - found) / (found.shape[-2] - 1)


def regions(seen: Seen, tiling: Tiling) -> Tensor | None:
    """(X, I, Nv) share of each visual token's patch in the region that the instruction asks about; None if fewer than two
    images have a question whose region is known and seen."""
    found = torch.zeros(*next(iter(seen.attention.values())).shape[1:], dtype=torch.float64)
    for x, samples in enumerate(seen.samples):
        for i, sample in enumerate(samples):
            boxes = sample.turns[0].boxes
            if boxes and (share := tiling.covered(decode(sample), boxes)) is not None:
                found[x, i, : len(share)] = torch.from_numpy(share)
    return found if int(found.any(-1).any(-1).sum()) > 1 else None


def choose(seen: Seen, tiling: Tiling, settings: IrsSettings) -> tuple[LayerChoice, dict[Rows, Tensor]]:
    """The record of the search, and the backgrounds (none where images differ in their grids). Raises as `pick`."""
    grids, region = grids_of(seen, tiling), regions(seen, tiling)
    shared = backgrounds(seen) if len(grids) == 1 else {}
    scores = list(scored(seen, shared, region))
    X, I = seen.attention["all"].shape[1:3]  # noqa: E741
    choice = LayerChoice(
        **vars(rank(seen.attention["all"])),
        images=X,
        pairs=X * math.comb(I, 2),
        picked=pick(scores, settings, grids),
        views=[one.view for one in scores],
        region=None if region is None else _region(seen, region),
        grids=grids,
        backgrounds=[_background(rows, of_layers) for rows, of_layers in shared.items()],
    )
    return choice, shared


def pick(scores: list[Scored], settings: IrsSettings, grids: list[str]) -> Picked:
    """By the rule of params/irs.yaml.

    irs: the layer of the highest IRS, of the weighting and rows asked for. pointing: the highest share of the weights on the
    asked region, among all layers, weightings and rows, or those asked for. given: as asked for.

    Raises:
        DataError: pointing without regions, or centred weights where images have different grids: then there is no background
            that a training image's attention could be compared with.
        ModelError: the teacher has no such layer.
    """
    where = "params/irs.yaml: "
    if settings.weighting == "centred" and len(grids) > 1:
        raise DataError(
            f"{where}weighting is centred, which needs the same visual tokens for all images to have one background; the images"
            f" searched have {', '.join(grids)}; set weighting: mean"
        )
    able = [
        one
        for one in scores
        if settings.weighting in (None, one.weighting)
        and settings.instruction_rows in (None, one.rows)
        and (len(grids) == 1 or one.weighting == "mean")
    ]
    layers = len(able[0].irs)
    if settings.rule == "pointing":
        found = {
            (layer, one.weighting, one.rows): of_layer
            for one in able
            if one.pointing is not None
            for layer, of_layer in enumerate(one.pointing)
        }
        if not found:
            raise DataError(
                f"{where}rule is pointing, and the region that a question asks about is known on fewer than two of the images"
                " searched (`boxes`, docs/data.md), or it is not known where the teacher's visual tokens lie; set rule: irs"
            )
        best, *others = sorted(found, key=lambda key: -float(found[key].mean()))
        second = others[0] if others else None
        lead = None if second is None else found[best] - found[second]
        separated = lead is not None and float(lead.mean()) > Z * standard_error(lead)
        layer, weighting, rows = best
        return Picked(rule="pointing", layer=layer, weighting=weighting, rows=rows, runner_up=second, separated=separated)
    (one,) = able
    highest = int(one.irs.mean(1).argsort(descending=True, stable=True)[0])
    layer = highest if settings.layer is None else settings.layer
    if layer >= layers:
        raise ModelError(f"{where}layer is {layer}, but the teacher has layers 0..{layers - 1}")
    return Picked(rule=settings.rule, layer=layer, weighting=one.weighting, rows=one.rows, runner_up=None, separated=False)


def grids_of(seen: Seen, tiling: Tiling) -> list[str]:
    """The different grids of visual tokens that the images have, in words."""
    if tiling.tokens is not None:
        return [f"{tiling.tokens} tokens"]
    found = {
        (tiling.grid(decode(samples[0])) or (), int(tokens)) for samples, tokens in zip(seen.samples, seen.tokens, strict=True)
    }
    return [" x ".join(map(str, grid)) if grid else f"{tokens} tokens" for grid, tokens in sorted(found)]


def interval(values: Tensor) -> Interval:
    """95%, of the mean of independent values."""
    half = Z * standard_error(values)
    return float(values.mean()) - half, float(values.mean()) + half


def _region(seen: Seen, region: Tensor) -> Region:
    own = seen.tokens[:, None, None].double()
    equal = pointing((1 / own).expand(*region.shape)[None], region)[0]
    known = region.any(-1)
    return Region(images=len(equal), questions=int(known.sum()), equal=float(equal.mean()), equal_ci95=interval(equal))


def _background(rows: Rows, of_layers: Tensor) -> Background:
    sinks = of_layers > SINK / of_layers.shape[1]
    return Background(
        rows=rows,
        most=of_layers.amax(1).tolist(),
        sinks=[layer.nonzero()[:, 0].tolist() for layer in sinks],
        on_sinks=(of_layers * sinks).sum(1).tolist(),
    )
