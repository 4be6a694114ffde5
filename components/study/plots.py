"""Figures of a study: pure functions of the result and a theme."""

from __future__ import annotations

from math import inf

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from components.report.figures import Theme
from components.study.compare import StudyResult, Test, on_front
from components.study.runs import HOURS, MEMORY, SCORE

POINTS = 100
MAX_AXES = 12  # factors that parallel coordinates can show legibly
MAX_LABELS = 12  # variants, all of whose names fit beside their points
TITLES = {HOURS: "device time", MEMORY: "peak memory, MiB", SCORE: "exact match"}
MIN_LABEL_GAP = 0.05  # of the scores' range between two names on a Pareto front


def duration(hours: float) -> str:
    """Duration in seconds below a minute, in minutes below an hour, else in hours."""
    seconds = 3600 * hours
    return f"{seconds:.2g} s" if seconds < 59.5 else f"{seconds / 60:.1f} min" if hours < 1 else f"{hours:.2f} h"


def parallel_coordinates(result: StudyResult, theme: Theme) -> Figure:
    """Parallel coordinates: a line per run through factors, cost and score, coloured by score."""
    axes_names = [*result.factors, HOURS, MEMORY, SCORE]
    columns = {name: _positions(result, name) for name in axes_names}
    scores = [run.metrics[SCORE] for run in result.runs]
    shade = LinearSegmentedColormap.from_list("muted-to-accent", [theme.muted, theme.accent])
    scale = Normalize(min(scores), max(scores) if max(scores) > min(scores) else min(scores) + 1)
    figure = Figure(figsize=(max(5.0, 1.5 * len(axes_names)), 3.6))
    axes = figure.subplots()
    for index in sorted(range(len(scores)), key=lambda i: scores[i]):  # best run drawn last, on top
        values = [columns[name][0][index] for name in axes_names]
        axes.plot(range(len(axes_names)), values, color=shade(scale(scores[index])), linewidth=1.3, alpha=0.85)
    for position, name in enumerate(axes_names):
        axes.axvline(position, color=theme.muted, linewidth=0.8)
        for height, label in columns[name][1]:
            note = axes.annotate(label, (position, height), (4, 0), textcoords="offset points", fontsize=7.5, va="center")
            note.set_bbox({"boxstyle": "square,pad=0.15", "color": theme.paper, "alpha": 0.85})  # lines pass behind it
    axes.set_xticks(range(len(axes_names)), [TITLES.get(name, name) for name in axes_names])
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(axes_names) - 0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def differences(result: StudyResult, theme: Theme) -> Figure:
    """Forest plot: a row per comparison with its interval, by family; coloured if significant after Holm."""
    rows: list[str | Test] = []
    for family, tests in result.tests.items():
        rows += [family, *tests]
    figure = Figure(figsize=(8.0, max(2.0, 0.22 * len(rows) + 0.7)))
    axes = figure.subplots()
    axes.axvline(0, color=theme.muted, linewidth=0.8)
    for height, test in enumerate(rows):
        if isinstance(test, str):
            continue
        mean = POINTS * test.difference.mean
        low, high = (POINTS * bound for bound in test.difference.interval or (test.difference.mean,) * 2)
        colour = theme.muted if not test.significant else theme.accent if mean > 0 else theme.behind
        axes.plot([low, high], [height, height], color=colour, linewidth=1.6)
        axes.plot(mean, height, "o", color=colour, markersize=4.5)
    labels = [row if isinstance(row, str) else f"{row.variant} \N{MINUS SIGN} {row.against}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7.5)
    for row, label in zip(rows, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if isinstance(row, str) else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("difference of exact match, points")
    axes.grid(axis="x")
    return figure


def pareto(result: StudyResult, theme: Theme) -> Figure:
    """Score against device time and against memory, a point per variant, with the Pareto front as a line."""
    figure = Figure(figsize=(9.0, 3.6))
    left, right = figure.subplots(1, 2, sharey=True)
    max_hours = max(variant.hours for variant in result.variants)
    unit, per_hour = ("hours", 1) if max_hours >= 1 else ("minutes", 60) if max_hours >= 1 / 60 else ("seconds", 3600)
    times = [per_hour * variant.hours for variant in result.variants]
    memory = [variant.memory_mib for variant in result.variants]
    _front(left, result, times, f"device time per student, {unit}", theme)
    _front(right, result, memory, "peak memory, MiB", theme)
    left.set_ylabel("exact match, %")
    return figure


def _front(axes: Axes, result: StudyResult, costs: list[float], label: str, theme: Theme) -> None:
    scores = [POINTS * variant.score.mean for variant in result.variants]
    points = {variant.name: (variant.score.mean, cost) for variant, cost in zip(result.variants, costs, strict=True)}
    front = [index for index, name in enumerate(points) if on_front(name, points)]
    sorted_front = sorted(front, key=lambda i: costs[i])  # from the cheapest up
    axes.plot(
        [costs[i] for i in sorted_front],
        [scores[i] for i in sorted_front],
        color=theme.accent,
        linewidth=1.2,
        drawstyle="steps-post",
    )
    labelled_scores: list[float] = []  # scores whose points have a name, from the best down
    for index in sorted(range(len(costs)), key=lambda i: -scores[i]):
        on_line = index in sorted_front
        axes.plot(
            costs[index], scores[index], "o", color=theme.accent if on_line else theme.muted, markersize=6 if on_line else 4
        )
        legible = not labelled_scores or labelled_scores[-1] - scores[index] > MIN_LABEL_GAP * (max(scores) - min(scores))
        if len(costs) <= MAX_LABELS or (on_line and legible):
            labelled_scores.append(scores[index])
            name = result.variants[index].name
            axes.annotate(name, (costs[index], scores[index]), (5, 4), textcoords="offset points", fontsize=7.5)
    axes.set_xlim(0, 1.25 * max(costs) or 1)
    axes.set_xlabel(label)
    axes.grid()


def _positions(result: StudyResult, name: str) -> tuple[list[float], list[tuple[float, str]]]:
    """Position of each run on the axis, 0..1, and the axis labels."""
    if name in result.factors:
        levels = sorted(dict.fromkeys(run.params.get(name, "") for run in result.runs), key=_size)
        position = {level: index / max(len(levels) - 1, 1) for index, level in enumerate(levels)}
        return [position[run.params.get(name, "")] for run in result.runs], [
            (height, level) for level, height in position.items()
        ]
    values = [run.metrics[name] for run in result.runs]
    low, high = min(values), max(values)
    spread = high - low or 1.0
    fmt = duration if name == HOURS else "{:.3g}".format
    return [(value - low) / spread for value in values], [(0.0, fmt(low)), (1.0, fmt(high))]


def _size(level: str) -> float:
    """Sort key of a level: numbers by value; words after them, in the study's order."""
    try:
        return float(level)
    except ValueError:
        return inf
