"""Style of all figures: a light and a dark matplotlib theme, and deterministic PNG bytes."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

DPI = 200
SHIPPED = ("sft", "kd", "kd_uniform", "kd_iva", "kd_tpa", "align_ti")  # arms of the shipped recipes


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    muted: str  # secondary text, reference lines
    faint: str  # grid
    accent: str
    behind: str  # colour for worse, as accent for better
    series: tuple[str, ...]  # colours of arms: `SHIPPED` in order, then other names

    def colour(self, index: int) -> str:
        return self.series[index % len(self.series)]

    def dash(self, index: int) -> str:
        """Dash style of an index; separates arms of one colour once `series` repeats."""
        return ("-", "--", ":", "-.")[index // len(self.series) % 4]


def series_indices(arms: Iterable[str]) -> dict[str, int]:
    """Arm -> index in `series`, by a hash of its name, so that all reports use one colour per arm. On a collision the next
    free index; once all are taken, a colour again with another dash."""
    indices: dict[str, int] = {}
    slots = len(LIGHT.series) - len(SHIPPED)
    for arm in arms:
        start = zlib.crc32(arm.encode()) % slots
        candidates = (len(SHIPPED) + (start + n) % slots + n // slots * len(LIGHT.series) for n in count())
        indices[arm] = (
            SHIPPED.index(arm) if arm in SHIPPED else next(index for index in candidates if index not in indices.values())
        )
    return indices


LIGHT = Theme(
    paper="#ffffff",
    ink="#1c2430",
    muted="#667080",
    faint="#e4e7ec",
    accent="#1f5fa8",
    behind="#b3392f",
    series=(
        *["#8b93a0", "#4a5568", "#b8862f", "#3e8e7e", "#8a5ea8", "#1f5fa8"],
        *["#b3392f", "#c2701e", "#5b7f2b", "#2b8fb5", "#c04f86", "#7a5a3a", "#6a4fc4", "#8a8a1f", "#1d7a4f", "#a04668"],
    ),
)
DARK = Theme(
    paper="#14181f",
    ink="#e6e9ee",
    muted="#98a2b1",
    faint="#2a313c",
    accent="#6fb0f5",
    behind="#f0857a",
    series=(
        *["#7d8795", "#b6bfcc", "#dcb15c", "#66c2ae", "#bb93d8", "#6fb0f5"],
        *["#f0857a", "#f0a35e", "#a3c96b", "#6cc6e6", "#ee8dba", "#c49f7c", "#a592f5", "#cfcf62", "#5fc596", "#dd8aa8"],
    ),
)


def draw(plot: Callable[..., Figure], *args: Any, theme: Theme = LIGHT) -> bytes:
    """PNG bytes of `plot(*subject, theme)`."""
    style: Any = {
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
        "font.family": "DejaVu Sans",  # bundled with matplotlib, so output is the same on every machine
        "font.size": 9,
        "text.parse_math": False,  # no mathtext: questions may contain dollar signs
        "figure.constrained_layout.use": True,
    }
    with rc_context(style):
        buffer = io.BytesIO()
        plot(*args, theme).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
