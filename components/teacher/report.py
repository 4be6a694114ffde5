"""The candidates side by side: a table in Markdown, and quality against cost."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from components.artifacts import Candidate, TeacherReport
from components.figures import Theme
from components.settings import TeacherSettings


def table(report: TeacherReport, limits: TeacherSettings, samples: int) -> str:
    """The reason, the figures of every candidate, exact match per question kind, and the limits, as Markdown."""
    figures: dict[str, Callable[[Candidate], str]] = {
        "exact match": lambda c: f"{c.exact_match:.1%}",
        "nats per answer token": lambda c: f"{c.nats_per_token:.3f}",
        "IRS of its best layer": lambda c: f"{c.irs:.3f} (layer {c.irs_layer})",
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
        "machine; memory is the weights and the most tensors alive while one batch is answered.\n\n"
        f"{_grid(report, '', figures)}\n## Exact match per kind\n\n{_grid(report, 'kind', per_kind)}"
    )


def _grid(report: TeacherReport, corner: str, rows: dict[str, Callable[[Candidate], str]]) -> str:
    """Candidates as columns."""
    lines = [
        [corner, *(c.name for c in report.candidates)],
        ["---"] + ["---:"] * len(report.candidates),
        *([name, *(cell(c) for c in report.candidates)] for name, cell in rows.items()),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def quality_cost(report: TeacherReport, limits: TeacherSettings, theme: Theme) -> Figure:
    """Exact match against parameters and against time; the chosen candidate ringed, limits as lines, refused ones hollow."""
    figure = Figure(figsize=(7.6, 3.4))
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(
        left,
        report,
        theme,
        lambda c: c.parameters / 1e6,
        "parameters, millions",
        limits.max_parameters and limits.max_parameters / 1e6,
    )
    _panel(right, report, theme, lambda c: c.seconds_per_1000, "seconds per 1,000 samples", limits.max_seconds_per_1000)
    for axes in (left, right):
        axes.axhline(100 * limits.min_exact_match, color=theme.muted, linestyle="--", linewidth=1)
    left.set_ylabel("exact match, %")
    figure.suptitle(f"Teacher candidates: {report.chosen} is chosen", x=0.01, ha="left", fontweight="bold", fontsize=10.5)
    return figure


def _panel(
    axes: Axes, report: TeacherReport, theme: Theme, cost: Callable[[Candidate], float], label: str, limit: float | None
) -> None:
    for c in report.candidates:
        chosen = c.name == report.chosen
        colour = theme.accent if chosen else theme.muted
        x, y = cost(c), 100 * c.exact_match
        axes.plot(x, y, "o", color=colour, markerfacecolor=theme.paper if c.refused else colour, markersize=9 if chosen else 7)
        words = c.name + (" (chosen)" if chosen else " (refused)" if c.refused else "")
        axes.annotate(words, (x, y), (0, 9), textcoords="offset points", ha="center", color=colour, fontsize=9)
    if limit is not None:
        axes.axvline(limit, color=theme.muted, linestyle="--", linewidth=1)
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.margins(x=0.3, y=0.2)
    axes.grid()
