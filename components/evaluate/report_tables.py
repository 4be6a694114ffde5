"""Tables of the report: a column per model, a line per measure, kind, gain and cost; and smaller tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from components.evaluate import plots
from components.evaluate.measures import EXACT_MATCH, MEASURES, Measure
from components.evaluate.statistics import Interval
from components.records.compare import ArmResult, Comparison, Difference, TeacherResult
from components.report import markdown as md

Table = tuple[list[str], list[list[str]]]  # header, rows


@dataclass(frozen=True)
class Cell:
    """Table cell: a number and a second line; `strong`: a gain larger than the noise."""

    value: str
    below: str = ""
    strong: bool = False


EMPTY = Cell(md.DASH)


@dataclass(frozen=True)
class Line:
    label: str
    cells: list[Cell]
    starts_group: bool = False
    belongs_above: bool = False


def table(comparison: Comparison) -> list[Line]:
    """Main table: a column for the teacher and for each arm from the best down, a line per measure."""
    arms = [comparison.arms[name] for name in comparison.order]
    columns = list(comparison.results.values())
    lines = [
        Line(name.replace("weights.", "weight of "), [EMPTY, *(_setting_cell(name, arm.settings) for arm in arms)])
        for name in arms[0].settings
    ]
    lines.append(Line("exact match, %", [_estimate_cell(r.exact_match, r.ci95) for r in columns], starts_group=True))
    if len(set(comparison.kinds.values())) > 1:  # with equal counts the two averages are equal
        lines.append(Line("average over kinds, %", [_estimate_cell(r.average, r.average_ci95) for r in columns]))
    lines += [Line(MEASURES[name].title, _measure_cells(name, columns)) for name in comparison.measures]
    kinds = plots.differing_kinds(comparison)
    lines += [
        Line(f"{plain(kind)} ({comparison.kinds[kind]:,})", _kind_cells(columns, kind), starts_group=index == 0)
        for index, kind in enumerate(kinds)
    ]
    for index, baseline in enumerate(plots.baselines(comparison)):
        gains = [arm.gains.get(baseline) for arm in arms]
        lines.append(Line(f"gain over {baseline}, points", [EMPTY, *map(gain_cell, gains)], starts_group=index == 0))
        lines.append(Line("p (Holm)", [EMPTY, *map(_p_value_cell, gains)], belongs_above=True))
    lines.append(Line("share of the teacher, %", [Cell("100"), *map(_share_cell, arms)], starts_group=True))
    lines.append(Line("training, s per step", [EMPTY, *map(_pace_cell, arms)], starts_group=True))
    lines.append(Line("peak memory, MiB", [EMPTY, *(Cell(f"{arm.peak_memory_mib:,.0f}") for arm in arms)]))
    return lines


def measures(comparison: Comparison) -> list[Line]:
    """Measures other than exact match, each followed by the arms' differences from every baseline."""
    lines = []
    for name, contrast in comparison.measures.items():
        measure, better = MEASURES[name], "lower" if MEASURES[name].lower_is_better else "higher"
        cells = _measure_cells(name, comparison.results.values())
        lines.append(Line(f"{measure.title} ({better} is better)", cells, starts_group=True))
        for baseline in plots.baselines(comparison):
            measure_gains = [contrast.gain(arm, baseline) if arm != baseline else None for arm in comparison.order]
            lines.append(
                Line(f"minus {baseline}, {measure.unit}", [EMPTY, *(gain_cell(gain, measure) for gain in measure_gains)])
            )
    return lines


def small_tables(comparison: Comparison) -> dict[str, Table]:
    """Tables by name: yes/no figures, resolution of the sample, published runs, seeds of each arm."""
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    yes_no_rows = [
        [name, *(md.percent(getattr(result.yes_no_overall, figure)) for figure in names)]
        for name, result in comparison.results.items()
        if result.yes_no_overall
    ]
    if len({tuple(row[1:]) for row in yes_no_rows}) == 1:
        yes_no_rows = [["teacher and all arms", *yes_no_rows[0][1:]]]
    tables = (
        {"yes_no": (["yes/no questions", "accuracy", "precision", "recall", "F1", "yes ratio"], yes_no_rows)}
        if yes_no_rows
        else {}
    )
    rows = []
    for name, contrast in {EXACT_MATCH: comparison.exact_match, **comparison.measures}.items():
        gaps = (contrast.noise or None, contrast.detectable or None, contrast.spread)  # 0: most pairs answer alike
        gap_cells = [md.DASH if gap is None else MEASURES[name].format(gap) for gap in gaps]
        rows.append([MEASURES[name].title, MEASURES[name].unit, *gap_cells])
    header = ["measure", "unit", "may be chance below", "seen four times in five", "deviation between seeds"]
    tables["resolution"] = header, rows
    if comparison.published:
        rows = []
        for name, result in comparison.results.items():
            scores = comparison.published.scores.get(name, [])
            mean = md.percent(fmean(scores)) if scores else md.DASH
            deviation = md.percent(stdev(scores)) if len(scores) > 1 else md.DASH
            this_run = _estimate_cell(result.exact_match, result.ci95)
            rows.append([name, f"{this_run.value} {this_run.below}", mean, deviation, f"{len(scores)}"])
        tables["published"] = ["", "this run, %", "published, mean, %", "deviation between seeds, points", "seeds"], rows
    if comparison.repeated:
        rows = []
        for name, arm in comparison.arms.items():
            run_scores = ", ".join(f"{run} {md.percent(score)}" for run, score in arm.runs.items())
            rows.append([name, f"{len(arm.runs)}", run_scores, md.percent(arm.exact_match)])
        tables["seeds"] = ["arm", "runs", "exact match of each, %", "mean, %"], rows
    return tables


def pairs(comparison: Comparison) -> list[Line]:
    """Matrix of pairwise differences: line minus column, for each arm and each ranked below it."""
    by_pair = {(pair.arm, pair.against): pair for pair in comparison.pairs}
    cells = {arm: [by_pair.get((arm, other)) for other in comparison.order[1:]] for arm in comparison.order[:-1]}
    return [Line(arm, [gain_cell(pair) if pair else Cell("") for pair in row]) for arm, row in cells.items()]


def plain(name: str) -> str:
    return name.replace("_", " ")


def _estimate_cell(value: float, interval: Interval, fmt: Callable[[float], str] = md.percent, strong: bool = False) -> Cell:
    low, high = map(fmt, interval)
    return Cell(fmt(value), f"[{low}, {high}]", strong)


def _measure_cells(name: str, columns: Iterable[TeacherResult]) -> list[Cell]:
    estimates = (column.measures[name] for column in columns)
    return [_estimate_cell(estimate.value, estimate.ci95, MEASURES[name].format) for estimate in estimates]


def _kind_cells(columns: list[TeacherResult], kind: str) -> list[Cell]:
    """Exact match, with token F1 below it where the kind has answers of several words."""
    f1 = [column.measures["token_f1"].per_kind[kind] for column in columns]
    show_f1 = any(abs(value - column.per_kind[kind]) > 5e-4 for value, column in zip(f1, columns, strict=True))
    return [
        Cell(md.percent(column.per_kind[kind]), f"F1 {md.percent(value)}" if show_f1 else "")
        for value, column in zip(f1, columns, strict=True)
    ]


def gain_cell(gain: Difference | None, measure: Measure = MEASURES[EXACT_MATCH]) -> Cell:
    if gain is None:
        return EMPTY
    return _estimate_cell(gain.difference, gain.ci95, measure.format_difference, gain.larger_than_noise)


def _p_value_cell(gain: Difference | None) -> Cell:
    return EMPTY if gain is None else Cell(md.p_value(gain.p_value), f"({md.p_value(gain.p_holm)})")


def _share_cell(arm: ArmResult) -> Cell:
    if arm.share_of_teacher is None or arm.share_ci95 is None:
        return EMPTY
    return _estimate_cell(arm.share_of_teacher, arm.share_ci95)


def _setting_cell(name: str, settings: Mapping[str, Any]) -> Cell:
    """Value of a setting; an unset option shows `default` if its term has a weight in the arm, else a dash."""
    value = settings[name]
    if value is None:
        return Cell("default") if settings.get(f"weights.{name.partition('.')[0]}", 1) else EMPTY
    return Cell(f"{value:g}" if isinstance(value, float) else str(value))


def _pace_cell(arm: ArmResult) -> Cell:
    total = f"{arm.train_seconds:,.0f}" if arm.train_seconds >= 10 else f"{arm.train_seconds:.1f}"
    return Cell(f"{arm.step_seconds:.3g}", f"{total} s in all")
