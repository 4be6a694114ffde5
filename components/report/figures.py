"""Style of all figures: a light and a dark theme of matplotlib, and deterministic PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

DPI = 200


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    muted: str  # secondary text, reference lines
    faint: str  # grid
    accent: str
    series: tuple[str, ...]  # one colour per arm, in the order of the study

    def colour(self, index: int) -> str:
        return self.series[index % len(self.series)]

    def dash(self, index: int) -> str:
        """Colours come round again after `series`; the dash tells the rounds apart."""
        return ("-", "--", ":", "-.")[index // len(self.series) % 4]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1c2430",
    muted="#667080",
    faint="#e4e7ec",
    accent="#1f5fa8",
    series=("#8b93a0", "#4a5568", "#b8862f", "#3e8e7e", "#8a5ea8", "#1f5fa8"),
)
DARK = Theme(
    paper="#14181f",
    ink="#e6e9ee",
    muted="#98a2b1",
    faint="#2a313c",
    accent="#6fb0f5",
    series=("#7d8795", "#b6bfcc", "#dcb15c", "#66c2ae", "#bb93d8", "#6fb0f5"),
)


def draw(plot: Callable[..., Figure], *subject: Any, theme: Theme = LIGHT) -> bytes:
    """`plot(*subject, theme)` as PNG."""
    look: Any = {
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": theme.faint,
        "grid.linewidth": 0.8,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same
        "font.size": 9,
        "text.parse_math": False,  # a question may hold a dollar sign, and then is no formula
        "figure.constrained_layout.use": True,
    }
    with rc_context(look):
        buffer = io.BytesIO()
        plot(*subject, theme).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
