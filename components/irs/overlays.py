"""The pictures of the layer search: IRS per layer, and where two instructions on one image make the teacher look."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from components.artifacts import LayerChoice
from components.errors import DataError
from components.figures import Theme


@dataclass(frozen=True)
class Gaze:
    """One instruction and where it makes the teacher look."""

    question: str
    reference: str
    attention: NDArray[np.float32]  # (Nv,) from the instruction to the visual tokens, row by row of the visual grid


def seen_by(processor: Any, image: Image.Image) -> NDArray[np.uint8]:
    """The RGB image as the model sees it, (H, W, 3): resized and cropped, so that the visual tokens tile it."""
    pixels = processor.image_processor(images=[image], return_tensors="np", do_normalize=False, do_rescale=False)[
        "pixel_values"
    ]
    shown = pixels[0][0] if pixels[0].ndim == 4 else pixels[0]  # one tile, of families that split others into several
    return np.clip(np.moveaxis(shown, 0, -1), 0, 255).astype(np.uint8)


def curve(choice: LayerChoice, theme: Theme) -> Figure:
    """IRS per layer with its standard error; the winner is marked, and named as separated from the runner-up or not."""
    layers = np.arange(len(choice.irs))
    figure = Figure(figsize=(7.2, 3.0))
    axes = figure.subplots()
    axes.errorbar(
        layers, choice.irs, choice.standard_error, color=theme.muted, linewidth=1.4, marker="o", markersize=5, capsize=3
    )
    best = choice.irs[choice.layer]
    axes.errorbar(
        choice.layer, best, choice.standard_error[choice.layer], color=theme.accent, marker="o", markersize=9, capsize=3
    )
    axes.annotate(
        f"layer {choice.layer}: {best:.3f}", (choice.layer, best + choice.standard_error[choice.layer]), (0, 7),
        textcoords="offset points", ha="center", color=theme.accent, fontweight="bold",
    )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("IRS")
    axes.margins(x=0.08)
    axes.set_ylim(0, 1.25 * max(i + e for i, e in zip(choice.irs, choice.standard_error, strict=True)) or 1)
    axes.grid(axis="y")
    return figure


@dataclass(frozen=True)
class Heat:
    """One panel of `heatmaps`."""

    above: str
    below: str
    grid: NDArray[np.float32]  # (rows, columns) of visual tokens, 1 being an equal share of the attention


def overlay(image: NDArray[np.uint8], gazes: Sequence[Gaze], layer: int, theme: Theme) -> Figure:
    """The image (H, W, 3) as the teacher sees it, and once per instruction with the attention of `layer` laid over it.

    The colour says how many times its equal share a visual token receives, on one scale for all instructions.
    Raises DataError if the visual tokens are no square grid.
    """
    heats = [Heat(gaze.question, f"reference: {gaze.reference}", _grid(gaze.attention)) for gaze in gazes]
    return heatmaps(image, heats, f"layer {layer}: attention / equal share", theme)


def heatmaps(image: NDArray[np.uint8], heats: Sequence[Heat], label: str, theme: Theme) -> Figure:
    """The image (H, W, 3), and once per heat with that laid over it, on one scale."""
    most = max(float(heat.grid.max()) for heat in heats)
    figure = Figure(figsize=(2.9 * (1 + len(heats)) + 0.5, 3.35))
    panels = figure.subplots(1, 1 + len(heats))
    height, width = image.shape[:2]
    panels[0].imshow(image, interpolation="nearest")
    panels[0].set_title("the image", color=theme.muted, fontweight="normal")
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    for axes, heat in zip(panels[1:], heats, strict=True):
        axes.imshow(grey, interpolation="nearest")
        drawn = axes.imshow(
            heat.grid,
            cmap="magma",
            vmin=0,
            vmax=most,
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            alpha=_visible(heat.grid / most),
        )
        axes.set_title("\n".join(textwrap.wrap(heat.above, 34)))
        axes.set_xlabel(textwrap.shorten(heat.below, 45, placeholder=" …"))
    for axes in panels:
        _bare(axes)
    figure.colorbar(drawn, ax=panels, shrink=0.75, aspect=28, label=label)
    return figure


def _grid(attention: NDArray[np.float32]) -> NDArray[np.float32]:
    """(Nv,) -> (side, side), 1 being an equal share of the attention that goes to the image."""
    side = math.isqrt(len(attention))
    if side * side != len(attention):
        raise DataError(f"{len(attention)} visual tokens are no square grid, so there is no picture of where they lie")
    return (attention / attention.mean()).reshape(side, side)


def _visible(share: NDArray[np.float32]) -> NDArray[np.float32]:
    """Opacity: the image shows through where little attention goes, and still a little where most does."""
    return (0.15 + 0.5 * share).astype(np.float32)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
