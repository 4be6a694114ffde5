"""Table of the teacher candidates, and plot of quality against cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binomtest

from components.config.teacher import TeacherSettings
from components.records.teacher import Candidate, TeacherReport
from components.report import markdown as md
from components.report.figures import Theme


def table(report: TeacherReport, limits: TeacherSettings, samples: int) -> str:
    """Markdown report: reason, metrics of every candidate, exact match per question kind, and the limits."""
    figures: dict[str, Callable[[Candidate], str]] = {
        "exact match": lambda c: f"{c.exact_match:.1%}",
        "nats per answer token": lambda c: f"{c.nats_per_token:.3f}",
        "IRS of its best layer": lambda c: "none" if c.irs is None else f"{c.irs:.3f} (layer {c.irs_layer})",
        "parameters": lambda c: f"{c.parameters:,}",
        "seconds per 1,000 samples": lambda c: f"{c.seconds_per_1000:.2f}",
        "memory, MiB": lambda c: f"{c.memory_mib:.1f}",
        "verdict": lambda c: "**chosen**" if c.name == report.chosen else "; ".join(c.refused) or "within the limits",
    }
    kinds = report.candidates[0].per_kind
    per_kind: dict[str, Callable[[Candidate], str]] = {k: lambda c, k=k: f"{c.per_kind[k]:.1%}" for k in kinds}  # type: ignore[misc]
    set_limits = {name: value for name, value in limits.model_dump(exclude={"seed", "samples"}).items() if value is not None}
    return (
        f"# Teacher: {report.chosen}\n\n{report.reason}\n\n"
        "Rule: the best exact match among the candidates within the limits; among those within `tie_margin` of it, "
        "the smallest. "
        f"Limits: {', '.join(f'`{name}` {value:,}' for name, value in set_limits.items())} (params/teacher.yaml).\n\n"
        f"On {samples:,} validation samples, as evenly over the question kinds as they go. Seconds are of this run and this "
        "machine; memory is the weights and the most that is allocated while one batch is answered.\n\n"
        f"{_grid(report, '', figures)}\n## Exact match per kind\n\n{_grid(report, 'kind', per_kind)}"
    )


def _grid(report: TeacherReport, corner: str, rows: dict[str, Callable[[Candidate], str]]) -> str:
    """Markdown table with candidates as columns."""
    header = [corner, *(c.name for c in report.candidates)]
    return md.table(header, ([name, *map(cell, report.candidates)] for name, cell in rows.items())) + "\n"


def quality_cost(report: TeacherReport, limits: TeacherSettings, samples: int, theme: Theme) -> Figure:
    """Plot of exact match against parameters and time, with 95% Wilson intervals over `samples`; the chosen candidate in
    colour, refused ones hollow, limits as dashed lines."""
    figure = Figure(figsize=(7.6, 3.6))
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, report, samples, theme, lambda c: c.parameters / 1e6)
    _panel(right, report, samples, theme, lambda c: c.seconds_per_1000)
    left.set_xlabel("parameters, millions")
    right.set_xlabel("seconds per 1,000 samples")
    left.set_ylabel("exact match, %")
    small: dict[str, Any] = {"color": theme.muted, "fontsize": 8, "va": "bottom", "ha": "right", "clip_on": True}
    dashed: dict[str, Any] = {"color": theme.muted, "linestyle": "--", "linewidth": 1}
    if limits.min_exact_match is not None:
        for axes in (left, right):
            axes.axhline(100 * limits.min_exact_match, **dashed)
            axes.text(1, 100 * limits.min_exact_match, "min_exact_match", transform=axes.get_yaxis_transform(), **small)
    cost_limits = {"max_parameters": limits.max_parameters, "max_seconds_per_1000": limits.max_seconds_per_1000}
    for axes, (name, limit), unit in zip((left, right), cost_limits.items(), (1e6, 1), strict=True):
        if limit is not None:
            axes.axvline(limit / unit, **dashed)
            axes.text(limit / unit, 0.02, name, rotation=90, transform=axes.get_xaxis_transform(), **small)
    left.margins(y=0.15)
    figure.suptitle(f"Teacher candidates: {report.chosen} is chosen", x=0.01, ha="left", fontweight="bold", fontsize=10.5)
    return figure


def _panel(axes: Axes, report: TeacherReport, samples: int, theme: Theme, cost: Callable[[Candidate], float]) -> None:
    for index, c in enumerate(sorted(report.candidates, key=cost)):
        chosen, label_above = c.name == report.chosen, index % 2 == 0
        colour = theme.accent if chosen else theme.muted
        interval = binomtest(round(c.exact_match * samples), samples).proportion_ci(0.95, method="wilson")
        low, high = 100 * interval.low, 100 * interval.high
        axes.plot([cost(c)] * 2, [low, high], color=colour, linewidth=1.6)
        fill = theme.paper if c.refused else colour
        axes.plot(cost(c), 100 * c.exact_match, "o", color=colour, markerfacecolor=fill, markersize=9 if chosen else 7)
        axes.annotate(  # alternating above and below, against overlap of neighbours
            c.name + (" (chosen)" if chosen else " (refused)" if c.refused else ""),
            (cost(c), high if label_above else low),
            (0, 4 if label_above else -4),
            textcoords="offset points",
            ha="center",
            va="bottom" if label_above else "top",
            color=colour,
            fontsize=9,
        )
    axes.set_xlim(0, 1.25 * max(cost(c) for c in report.candidates))
    axes.grid()
