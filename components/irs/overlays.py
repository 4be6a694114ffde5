"""Figures of the layer search: IRS per layer, and attention overlays of two instructions on one image."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from components.errors import DataError
from components.records.irs import LayerChoice, Region
from components.report.figures import Theme


@dataclass(frozen=True)
class AttentionExample:
    """Attention map of one instruction, with its question, reference and region."""

    question: str
    reference: str
    mean: NDArray[np.float32]  # (Nv,) attention from the instruction to the visual tokens, row-major
    centred: NDArray[np.float32]  # (Nv,) centred attention, sum 1 or all zero
    region: NDArray[np.float64] | None  # (H, W) mask of the question's region: 1 inside, 0 outside; None: unknown


def curve(choice: LayerChoice, theme: Theme) -> Figure:
    """Plot of IRS per layer with standard errors; the best layer is marked.

    With known regions a second panel plots pointing per layer, weighting and kind of rows, with 95% intervals, against uniform
    weights; a ring marks the selected one.
    """
    figure = Figure(figsize=(7.2, 3.0) if choice.region is None else (7.2, 6.2), layout="constrained")
    panels = figure.subplots(1 if choice.region is None else 2, 1, squeeze=False)[:, 0]
    _irs(panels[0], choice, theme)
    if choice.region is not None:
        _pointing(panels[1], choice, choice.region, theme)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.margins(x=0.08)
        axes.grid(axis="y")
    return figure


def _irs(axes: Axes, choice: LayerChoice, theme: Theme) -> None:
    layers = np.arange(len(choice.irs))
    axes.errorbar(
        layers, choice.irs, choice.standard_error, color=theme.muted, linewidth=1.4, marker="o", markersize=5, capsize=3
    )
    best = choice.irs[choice.layer]
    axes.errorbar(
        choice.layer, best, choice.standard_error[choice.layer], color=theme.accent, marker="o", markersize=9, capsize=3
    )
    axes.annotate(
        f"layer {choice.layer}: {best:.3f}", (choice.layer, best + choice.standard_error[choice.layer]), (0, 7),
        textcoords="offset points", ha="center" if choice.layer else "left", color=theme.accent, fontweight="bold",
    )  # fmt: skip
    axes.set_ylabel("IRS")
    axes.set_ylim(0, 1.25 * max(i + e for i, e in zip(choice.irs, choice.standard_error, strict=True)) or 1)


def _pointing(axes: Axes, choice: LayerChoice, region: Region, theme: Theme) -> None:
    for view in choice.views:
        shares = np.array(view.pointing)
        axes.errorbar(
            np.arange(len(shares)),
            shares,
            np.abs(np.array(view.pointing_ci95).T - shares),
            color=theme.accent if view.weighting == "centred" else theme.muted,
            linestyle="-" if view.rows == "all" else ":",
            marker="o",
            markersize=4,
            capsize=3,
            label=f"{view.weighting}, {view.rows}",
        )
        if (view.weighting, view.rows) == (choice.picked.weighting, choice.picked.rows):
            layer = choice.picked.layer
            axes.plot(layer, shares[layer], "o", markersize=12, markerfacecolor="none", color=theme.ink)
    axes.axhline(region.equal, color=theme.muted, linestyle="--", linewidth=1, label="equal weights")
    axes.set_ylabel("share on the asked region")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", ncols=3)


@dataclass(frozen=True)
class Heat:
    """One panel of `heatmaps`."""

    above: str
    below: str
    grid: NDArray[np.float32]  # (rows, columns) attention per visual token, in multiples of the uniform share


def peaks(examples: Iterable[AttentionExample]) -> tuple[float, float]:
    """Maxima of mean and centred attention, in multiples of the uniform share: upper ends of the shared colour scales."""
    means, centred = zip(*((example.mean, example.centred) for example in examples), strict=True)
    return max(float(_grid(mean).max()) for mean in means), max(float(_grid(weights).max()) for weights in centred)


def overlay(
    image: NDArray[np.uint8], examples: Sequence[AttentionExample], peak: tuple[float, float], title: str, theme: Theme
) -> Figure:
    """Figure with a row per instruction: the preprocessed image (H, W, 3), then overlays of a layer's mean and centred
    attention. The question's region is outlined.

    Colour: attention of a visual token in multiples of the uniform share, one scale per column up to `most` (`peaks`).
    Raises DataError if the visual tokens do not form a square grid.
    """
    figure = Figure(figsize=(9.6, 3.3 * len(examples)), layout="constrained")
    table = figure.subplots(len(examples), 3, squeeze=False)
    grey = _grey(image)
    for axes, example in zip(table[:, 0], examples, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_title("\n".join(textwrap.wrap(example.question, 34)))
        axes.set_xlabel(textwrap.shorten(f"reference: {example.reference}", 36, placeholder=" …"))
    for column, name, column_peak in ((1, "mean", peak[0]), (2, "centred", peak[1])):
        for axes, example in zip(table[:, column], examples, strict=True):
            mappable = _heat(axes, grey, _grid(getattr(example, name)), column_peak)
            axes.set_title(name, color=theme.muted, fontweight="normal")
        figure.colorbar(mappable, ax=table[:, column], shrink=0.75, aspect=28, label=f"{title} / equal share")
    for row, example in zip(table, examples, strict=True):
        for axes in row:
            _outline(axes, example.region)
            _bare(axes)
    return figure


def _outline(axes: Axes, region: NDArray[np.float64] | None) -> None:
    """Outline of the region, white on black for contrast on any image."""
    if region is not None and region.any():
        x, y = (np.arange(-1, pixels + 1) for pixels in (region.shape[1], region.shape[0]))
        for colour, width in (("black", 3.5), ("white", 1.5)):
            axes.contour(x, y, np.pad(region, 1), levels=[0.5], colors=[colour], linewidths=width)


def heatmaps(
    images: Sequence[NDArray[np.uint8]], heats: Sequence[Sequence[Heat]], question: str, label: str, theme: Theme
) -> Figure:
    """Figure with a row per image (H, W, 3): the image, then one overlay per heat, on one colour scale; question and answers
    stand below the last."""
    peak = max(float(heat.grid.max()) for image_heats in heats for heat in image_heats)
    figure = Figure(figsize=(2.9 * (1 + len(heats[0])) + 0.5, 3.35 * len(images)))
    table = figure.subplots(len(images), 1 + len(heats[0]), squeeze=False)
    for number, (row, image, image_heats) in enumerate(zip(table, images, heats, strict=True), start=1):
        row[0].imshow(image, interpolation="nearest")
        title = "the image" if len(images) == 1 else f"image {number} of {len(images)}"
        row[0].set_title(title, color=theme.muted, fontweight="normal")
        for axes, heat in zip(row[1:], image_heats, strict=True):
            mappable = _heat(axes, _grey(image), heat.grid, peak)
            axes.set_title("\n".join(textwrap.wrap(heat.above, 34)))
        for axes in row:
            _bare(axes)
    table[-1][0].set_xlabel(_caption("asked", question))
    for axes, heat in zip(table[-1][1:], heats[-1], strict=True):
        axes.set_xlabel(_caption("answer", heat.below))
    figure.colorbar(mappable, ax=table, shrink=0.75 / len(images), aspect=28, label=label)
    return figure


def _caption(label: str, text: str) -> str:
    return "\n".join(textwrap.wrap(f"{label}: {text}", 30, max_lines=5, placeholder=" …"))


def _grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)


def _heat(axes: Axes, grey: NDArray[np.uint8], grid: NDArray[np.float32], peak: float) -> AxesImage:
    height, width = grey.shape[:2]
    axes.imshow(grey, interpolation="nearest")
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    alpha = 0.15 + 0.5 * (grid / peak)  # at most 0.65: the image stays visible
    return axes.imshow(grid, cmap="magma", vmin=0, vmax=peak, extent=extent, alpha=alpha)


def _grid(attention: NDArray[np.float32]) -> NDArray[np.float32]:
    """(Nv,) attention -> (side, side) in multiples of the uniform share; all 1 without attention."""
    side = math.isqrt(len(attention))
    if side * side != len(attention):
        raise DataError(f"{len(attention)} visual tokens are no square grid, so there is no picture of where they lie")
    attention = attention if attention.any() else np.ones_like(attention)
    return (attention / attention.mean()).reshape(side, side)


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
