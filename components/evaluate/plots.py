"""Figures of a comparison: pure functions of the results and a theme."""

from __future__ import annotations

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from components.align_ti import terms
from components.evaluate.load_results import Losses
from components.evaluate.measures import MEASURES
from components.records.compare import Comparison, TeacherResult
from components.report.figures import Theme, series_indices

POINTS = 100  # factor from shares to percent, from differences to points
DASHED = (0, (4, 3))


def scores(comparison: Comparison, theme: Theme) -> Figure:
    """Exact match of every arm with its interval, best on top, published runs below it, and the teacher as a line."""
    arms = comparison.order[::-1]
    figure = Figure(figsize=(7.2, 1.3 + 0.36 * len(arms)))
    axes = figure.subplots()
    for row, arm in enumerate(arms):
        result = comparison.arms[arm]
        colour = _colour(comparison, arm, theme)
        axes.plot([POINTS * bound for bound in result.ci95], [row, row], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot(POINTS * result.exact_match, row, "o", color=colour, markersize=7)
        axes.annotate(
            f"{POINTS * result.exact_match:.1f}", (POINTS * result.exact_match, row), (0, 7), textcoords="offset points",
            ha="center", fontsize=8.5,
        )  # fmt: skip
        for score in comparison.published.scores.get(arm, []) if comparison.published else []:
            axes.plot(POINTS * score, row - 0.25, "D", color=colour, markerfacecolor=theme.paper, markersize=4)
    _teacher_line(axes, comparison.teacher, theme, "v")
    _row_per_arm(axes, arms, theme, top=len(arms) - 0.2)
    left, right = axes.get_xlim()
    if right - left < 2:  # equal scores: an axis of hundredths would tell nothing
        axes.set_xlim(left - 1, right + 1)
    axes.set_xlabel(f"exact match on {comparison.n:,} {comparison.split} questions, %")
    return figure


def gains(comparison: Comparison, theme: Theme) -> Figure:
    """Forest plot: each arm's gain over each baseline; filled where it is larger than the noise."""
    baseline_arms = baselines(comparison)
    arms = comparison.order[::-1]
    figure = Figure(figsize=(7.2, 1.3 + 0.34 * len(arms)))
    figure.set_layout_engine("constrained", wspace=0.06)
    panels = figure.subplots(1, len(baseline_arms), sharey=True, sharex=True, squeeze=False)[0]
    for axes, baseline in zip(panels, baseline_arms, strict=True):
        for row, arm in enumerate(arms):
            gain = comparison.arms[arm].gains.get(baseline)
            if gain is None:
                text_style = {"transform": axes.get_yaxis_transform(), "backgroundcolor": theme.paper}
                axes.text(0.03, row, "baseline", color=theme.muted, fontsize=8, va="center", **text_style)
                continue
            colour = _colour(comparison, arm, theme)
            fill = colour if gain.larger_than_noise else theme.paper
            _estimate(axes, row, POINTS * gain.difference, [POINTS * bound for bound in gain.ci95], colour, fill)
        axes.axvline(0, color=theme.muted, linewidth=1)
        axes.set_title(f"over {baseline}")
        axes.set_xlabel("points of exact match")
        _row_per_arm(axes, arms, theme, top=len(arms) - 0.4)
    return figure


def measures(comparison: Comparison, theme: Theme) -> Figure:
    """A panel per measure beside exact match: arms in the order of exact match, the teacher as a line."""
    arms = comparison.order[::-1]
    figure = Figure(figsize=(3.2 * len(comparison.measures), 1.3 + 0.34 * len(arms)))
    panels = figure.subplots(1, len(comparison.measures), sharey=True)
    for axes, name in zip(panels, comparison.measures, strict=True):
        measure = MEASURES[name]
        for row, arm in enumerate(arms):
            estimate, colour = comparison.arms[arm].measures[name], _colour(comparison, arm, theme)
            _estimate(
                axes, row, measure.scale * estimate.value, [measure.scale * bound for bound in estimate.ci95], colour, colour
            )
        teacher = measure.scale * comparison.teacher.measures[name].value
        axes.axvline(teacher, color=theme.muted, linewidth=1.2, linestyle=DASHED)
        axes.set_title("lower is better" if measure.lower_is_better else "higher is better", fontsize=8.5)
        axes.set_xlabel(measure.title)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _row_per_arm(axes, arms, theme, top=len(arms) - 0.4)
    return figure


def kinds(comparison: Comparison, theme: Theme) -> Figure:
    """Heat map of exact match, arms by `differing_kinds`, the teacher on top; coloured by the distance from `yardstick`."""
    rows = comparison.results
    names = differing_kinds(comparison) or list(comparison.kinds)
    values = POINTS * np.array([[row.per_kind[kind] for kind in names] for row in rows.values()])
    distances = values - values[list(rows).index(yardstick(comparison))]
    limit = max(5.0, float(np.abs(distances[1:]).max()))  # arms only: the teacher's lead would wash out their colours
    figure = Figure(figsize=(max(5.0, 1.6 + 0.72 * len(names)), 1.6 + 0.36 * len(rows)))
    axes = figure.subplots()
    shades = LinearSegmentedColormap.from_list("behind-to-ahead", [theme.behind, theme.paper, theme.accent])
    scale = 1.65 * limit  # keeps text legible on the darkest cell
    axes.imshow(distances.clip(-limit, limit), cmap=shades, vmin=-scale, vmax=scale, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8.5)
    axes.set_xticks(range(len(names)), [n.replace("_", " ") for n in names], rotation=32, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(length=0, labelcolor=theme.ink)
    axes.axhline(0.5, color=theme.ink, linewidth=1)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def baselines(comparison: Comparison) -> list[str]:
    """Arms that are the baseline of some gain."""
    return [arm for arm in comparison.arms if any(arm in other.gains for other in comparison.arms.values())]


def yardstick(comparison: Comparison) -> str:
    """Reference row of the heat map: kd, else the first baseline, else the teacher."""
    return "kd" if "kd" in comparison.arms else next(iter(baselines(comparison)), "teacher")


def differing_kinds(comparison: Comparison) -> list[str]:
    """Kinds of question on which the scores of teacher and arms are not all equal."""
    results = comparison.results.values()
    return [kind for kind in comparison.kinds if len({result.per_kind[kind] for result in results}) > 1]


def quality_cost(comparison: Comparison, theme: Theme) -> Figure:
    """Exact match against the median seconds of a training step."""
    figure = Figure(figsize=(7.2, 3.4))
    axes = figure.subplots()
    for arm in comparison.order:
        result = comparison.arms[arm]
        score = POINTS * result.exact_match
        low, high = (POINTS * bound for bound in result.ci95)
        axes.errorbar(
            result.step_seconds, score, [[score - low], [high - score]], fmt="o", markersize=7, linewidth=1.6,
            color=_colour(comparison, arm, theme), label=f"{arm}  ({result.step_seconds:.3g} s)",
        )  # fmt: skip
    _teacher_line(axes, comparison.teacher, theme, "h")
    axes.set_xlim(left=0)
    axes.set_xlabel("training of the student, seconds per step (median)")
    axes.set_ylabel("exact match, %")
    axes.grid()
    figure.legend(loc="outside right upper")
    return figure


def losses(comparison: Comparison, rows: Losses, theme: Theme) -> Figure:
    """Loss curves: a panel per term that some arm trains on, and one for the weighted total; a line per arm."""
    logged = dict.fromkeys(name for curve in rows.values() for row in curve[:1] for name in row)  # terms and other metrics
    trained = [t for t in logged if t in terms.names() and any(_curve(curve, t)[1] for curve in rows.values())] + ["total"]
    columns = min(3, len(trained))
    panel_rows = -(-len(trained) // columns)
    figure = Figure(figsize=(9.6, 0.5 + 2.2 * panel_rows))
    panels = figure.subplots(panel_rows, columns, squeeze=False, sharex=True).flat
    legend_lines: dict[str, Artist] = {}
    for axes, term in zip(panels, trained, strict=False):
        for arm, index in series_indices(comparison.arms).items():
            steps, values = _curve(rows[arm], term)
            if values:
                (line,) = axes.plot(
                    steps, values, color=theme.colour(index), linestyle=theme.dash(index), linewidth=1.3, label=arm
                )
                legend_lines.setdefault(arm, line)
        axes.set_title(f"L_{term}" if term != "total" else "weighted total")
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 3)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="major")
        axes.tick_params(labelbottom=True)  # the panel below may be empty
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
    for axes in list(figure.axes)[len(trained) :]:
        axes.remove()
    figure.legend(legend_lines.values(), legend_lines.keys(), loc="outside upper center", ncols=max(len(legend_lines), 1))
    return figure


def _curve(rows: list[dict[str, float]], term: str) -> tuple[list[float], list[float]]:
    """Steps and values of one term; zeros are dropped, as the axis is logarithmic."""
    points = [(row["step"], row[term]) for row in rows if row.get(term) is not None and row[term] > 0]
    return [step for step, _ in points], [value for _, value in points]


def _teacher_line(axes: Axes, teacher: TeacherResult, theme: Theme, direction: str) -> None:
    low, score, high = (POINTS * value for value in (teacher.ci95[0], teacher.exact_match, teacher.ci95[1]))
    if direction == "v":
        axes.axvspan(low, high, color=theme.muted, alpha=0.12, linewidth=0)
        axes.axvline(score, color=theme.muted, linewidth=1.2, linestyle=DASHED)
        axes.text(score, 1.01, f"teacher {score:.1f}", transform=axes.get_xaxis_transform(), ha="center", color=theme.muted)
    else:
        axes.axhspan(low, high, color=theme.muted, alpha=0.12, linewidth=0)
        axes.axhline(score, color=theme.muted, linewidth=1.2, linestyle=DASHED, label=f"teacher  ({score:.1f}%)")


def _estimate(axes: Axes, row: int, value: float, interval: list[float], colour: str, fill: str) -> None:
    axes.plot(interval, [row, row], color=colour, linewidth=2)
    axes.plot(value, row, "o", color=colour, markerfacecolor=fill, markersize=6.5)


def _row_per_arm(axes: Axes, arms: list[str], theme: Theme, top: float) -> None:
    """Label the rows 0, 1, ... up to `top` with the arms."""
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(-0.6, top)
    axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
    axes.grid(axis="x")


def _colour(comparison: Comparison, arm: str, theme: Theme) -> str:
    return theme.colour(series_indices(comparison.arms)[arm])
