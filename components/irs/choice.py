"""Layer selection: scores of every (weighting, rows, layer), and the selection rule of params/irs.yaml.

Scores: IRS, and pointing where questions have regions. IRS of centred weights is far above 0 for noise too (about 0.7:
weights clamped at 0 seldom overlap), so it compares layers and not weightings; pointing compares both.
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
from components.irs.search import AttentionMaps, Z, rank, separated, standard_error
from components.models.image_processor import decode_first_image
from components.records.irs import Attention, Background, Interval, LayerChoice, Picked, Region, Rows, View

SINK = 5  # threshold of an attention sink, as a multiple of the uniform share
KINDS: tuple[tuple[Attention, Rows], ...] = (("mean", "all"), ("mean", "words"), ("centred", "all"), ("centred", "words"))


class NoRegions(DataError):
    """The rule `pointing` has no regions to judge a layer by."""

    def __init__(self) -> None:
        super().__init__(
            "params/irs.yaml: rule is pointing, and the region that a question asks about is known on fewer than two of the"
            " images searched (`boxes`, docs/data.md), or it is not known where the teacher's visual tokens lie; set rule: irs"
        )


@dataclass(frozen=True)
class LayerScores:
    """Scores of all layers under one weighting and kind of rows."""

    weighting: Attention
    rows: Rows
    equal: Tensor  # (L,) number of instructions with uniform weights, because no attention is left
    irs: Tensor  # (L, X) per image
    pointing: Tensor | None  # (L, X') per image with a region

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


def backgrounds(maps: AttentionMaps) -> dict[Rows, Tensor]:
    """Background (L, Nv), sum 1, per kind of rows: mean shares over images and instructions, which have one visual grid."""
    return {rows: shares(attention.double()).mean((1, 2)).float() for rows, attention in maps.attention.items()}


def scored(maps: AttentionMaps, shared: dict[Rows, Tensor], region: Tensor | None) -> Iterator[LayerScores]:
    """Scores of all `KINDS`. Without a `shared` background, an instruction's is the mean over the image's other ones.

    Args:
        region: (X, I, Nv) as for `pointing`; None if unknown.
    """
    valid = torch.arange(next(iter(maps.attention.values())).shape[-1]) < maps.tokens[:, None]  # (X, Nv)
    equal = valid / valid.sum(-1, keepdim=True).double()
    for weighting, rows in KINDS:
        attention = maps.attention[rows].double()
        if weighting == "centred":
            attention = centred(
                attention, shared[rows][:, None, None].double() if shared else leave_one_out_background(attention)
            )
        unweighted = attention.sum(-1) == 0
        attention = torch.where(unweighted[..., None], equal[:, None], attention)
        pointing_scores = None if region is None else pointing(shares(attention), region)
        yield LayerScores(weighting, rows, unweighted.sum((1, 2)), irs_scores(attention), pointing_scores)


def leave_one_out_background(attention: Tensor) -> Tensor:
    """(..., I, Nv) leave-one-out background: mean shares of the image's other instructions."""
    attention_shares = shares(attention)
    return (attention_shares.sum(-2, keepdim=True) - attention_shares) / (attention_shares.shape[-2] - 1)


def regions(maps: AttentionMaps, tiling: Tiling) -> Tensor | None:
    """(X, I, Nv) share of each visual token's patch that lies in the instruction's region; None if fewer than two images
    have a question with a known, visible region."""
    coverage = torch.zeros(*next(iter(maps.attention.values())).shape[1:], dtype=torch.float64)
    for x, samples in enumerate(maps.samples):
        for i, sample in enumerate(samples):
            boxes = sample.turns[0].boxes
            if boxes and (share := tiling.coverage(decode_first_image(sample), boxes)) is not None:
                coverage[x, i, : len(share)] = torch.from_numpy(share)
    return coverage if int(coverage.any(-1).any(-1).sum()) > 1 else None


def choose(maps: AttentionMaps, tiling: Tiling, settings: IrsSettings) -> tuple[LayerChoice, dict[Rows, Tensor]]:
    """Record of the layer search, and the backgrounds (empty if visual grids differ). Raises as `pick`."""
    grids, region = grids_of(maps, tiling), regions(maps, tiling)
    shared = backgrounds(maps) if len(grids) == 1 else {}
    scores = list(scored(maps, shared, region))
    X, I = maps.attention["all"].shape[1:3]  # noqa: E741
    choice = LayerChoice(
        **vars(rank(maps.attention["all"])),
        images=X,
        pairs=X * math.comb(I, 2),
        picked=pick(scores, settings, grids),
        views=[entry.view for entry in scores],
        region=None if region is None else _region(maps, region),
        grids=grids,
        backgrounds=[_background(rows, background) for rows, background in shared.items()],
    )
    return choice, shared


def pick(scores: list[LayerScores], settings: IrsSettings, grids: list[str]) -> Picked:
    """Layer, weighting and rows selected by the rule of params/irs.yaml.

    irs: the layer of highest IRS under the configured weighting and rows. pointing: the highest pointing score over all
    layers, weightings and rows, or the configured ones. given: the configured layer, weighting and rows.

    Raises:
        DataError: pointing without regions, or centred weights with different visual grids: then there is no background to
            subtract from a training image's attention.
        ModelError: the configured layer is beyond the teacher's depth.
    """
    file = "params/irs.yaml: "
    if settings.weighting == "centred" and len(grids) > 1:
        raise DataError(
            f"{file}weighting is centred, which needs the same visual tokens for all images to have one background; the images"
            f" searched have {', '.join(grids)}; set weighting: mean"
        )
    candidates = [
        candidate
        for candidate in scores
        if settings.weighting in (None, candidate.weighting)
        and settings.instruction_rows in (None, candidate.rows)
        and (len(grids) == 1 or candidate.weighting == "mean")
    ]
    if settings.rule == "pointing":
        pointing_by_key = {
            (layer, candidate.weighting, candidate.rows): layer_scores
            for candidate in candidates
            if candidate.pointing is not None
            for layer, layer_scores in enumerate(candidate.pointing)
        }
        if not pointing_by_key:
            raise NoRegions
        best, *runners_up = sorted(pointing_by_key, key=lambda key: -float(pointing_by_key[key].mean()))
        runner_up = runners_up[0] if runners_up else None
        is_separated = runner_up is not None and separated(pointing_by_key[best] - pointing_by_key[runner_up])
        layer, weighting, rows = best
        return Picked(rule="pointing", layer=layer, weighting=weighting, rows=rows, runner_up=runner_up, separated=is_separated)
    (candidate,) = candidates
    best_layer = int(candidate.irs.mean(1).argsort(descending=True, stable=True)[0])
    layer = best_layer if settings.layer is None else settings.layer
    if layer >= len(candidate.irs):
        raise ModelError(f"{file}layer is {layer}, but the teacher has layers 0..{len(candidate.irs) - 1}")
    return Picked(
        rule=settings.rule, layer=layer, weighting=candidate.weighting, rows=candidate.rows, runner_up=None, separated=False
    )


def grids_of(maps: AttentionMaps, tiling: Tiling) -> list[str]:
    """Descriptions of the distinct visual grids of the images."""
    if tiling.tokens is not None:
        return [f"{tiling.tokens} tokens"]
    grids = {
        (tiling.grid(decode_first_image(samples[0])) or (), int(tokens))
        for samples, tokens in zip(maps.samples, maps.tokens, strict=True)
    }
    return [" x ".join(map(str, grid)) if grid else f"{tokens} tokens" for grid, tokens in sorted(grids)]


def interval(values: Tensor) -> Interval:
    """95% confidence interval of the mean of independent values (normal approximation)."""
    margin = Z * standard_error(values)
    return float(values.mean()) - margin, float(values.mean()) + margin


def _region(maps: AttentionMaps, region: Tensor) -> Region:
    token_counts = maps.tokens[:, None, None].double()
    equal = pointing((1 / token_counts).expand(*region.shape)[None], region)[0]
    has_region = region.any(-1)
    return Region(images=len(equal), questions=int(has_region.sum()), equal=float(equal.mean()), equal_ci95=interval(equal))


def _background(rows: Rows, background: Tensor) -> Background:
    sinks = background > SINK / background.shape[1]
    return Background(
        rows=rows,
        most=background.amax(1).tolist(),
        sinks=[layer.nonzero()[:, 0].tolist() for layer in sinks],
        on_sinks=(background * sinks).sum(1).tolist(),
    )
