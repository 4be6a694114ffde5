"""Report of the comparison: plots, a Markdown table, and one self-contained HTML file."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from components.config.evaluate import EvaluateSettings
from components.errors import DataError
from components.evaluate import origin, plots
from components.evaluate.headline import listed, noise_of, resolution
from components.evaluate.load_results import Outcomes, images_of
from components.evaluate.measures import EXACT_MATCH, MEASURES, Measure
from components.evaluate.metrics import OVERALL
from components.evaluate.scorers import SCORERS
from components.evaluate.statistics import Interval
from components.io import write_bytes, write_text
from components.irs.overlays import curve
from components.models.template import with_marks
from components.records.compare import ArmResult, Comparison, Difference, TeacherResult
from components.records.evaluate import Prediction
from components.records.irs import LayerChoice
from components.records.paths import DATASET, REPORTS, TEACHER_ARM
from components.records.teacher import TeacherReport
from components.report import markdown as md
from components.report.figures import DARK, DPI, LIGHT, draw, places
from components.report.pages import data_uri, templates, thumbnail

Plot = Callable[..., Figure]  # of a theme
Table = tuple[list[str], list[list[str]]]  # header, rows

OTHER_MEASURES = (
    "Token F1: the words that answer and reference share, counted as in SQuAD. Nats per reference token: the model's negative"
    " log-likelihood of the reference, its end included. KL: KL(teacher || model) at each of these tokens, over the whole"
    " vocabulary."
)
ONE_SEED = (
    "The intervals measure the noise of the test sample: what would change with other images and questions. Each arm is one"
    " training run with one seed, so they do not measure what would change with another seed: a difference larger than the"
    " noise of the test sample may still be smaller than that between two seeds."
)
OVER_SEEDS = (
    "The intervals measure what would change with other images and questions and with other seeds. How much seeds of one arm"
    " differ is taken to be the same for all arms, an arm of one seed included, and its uncertainty widens the intervals as in"
    " Student's t."
)
BESIDE = {
    "samples": "all answers",
    "controls": "controls without the image",
    "leaderboard": "leaderboard",
}  # command -> its page
WALL_CLOCK = (
    "Training time is wall clock of the machine that trained the arm, with whatever else ran on it: no measure of the method"
    " unless the machine was idle."
)

EXAMPLE_PX = 480  # longest side of an example's image in the report; smaller images go in as they are
CSS_PX_PER_INCH = 104


@dataclass(frozen=True)
class Picture:
    """An image as data URIs, for a light and for a dark page, and the width in CSS pixels that makes its letters the text's."""

    light: str
    dark: str
    width: int


@dataclass(frozen=True)
class Cell:
    """One number of the table and what stands below it; `strong`: a gain whose interval excludes zero."""

    value: str
    below: str = ""
    strong: bool = False


NOTHING = Cell(md.DASH)


@dataclass(frozen=True)
class Line:
    label: str
    cells: list[Cell]
    starts_group: bool = False
    belongs_above: bool = False


def write(comparison: Comparison, outcomes: Outcomes, settings: EvaluateSettings) -> Iterator[list[Path]]:
    """Write plots, then compare.md, then report.html under `reports/`; yields the paths of each part as it is done.

    Raises DataError if a picture or record of an earlier stage is missing.
    """
    own = _plots(comparison, outcomes)
    layer = LayerChoice.found()
    inherited: dict[str, Plot] = {"irs": partial(curve, layer)} if layer else {}  # search_layer's PNG, again for dark pages
    drawn = {name: draw(plot) for name, plot in own.items()}
    yield [_written(REPORTS / "plots" / f"{name}.png", picture) for name, picture in drawn.items()]
    write_text(REPORTS / "compare.md", markdown(comparison))
    yield [REPORTS / "compare.md"]
    drawn |= {name: draw(plot) for name, plot in inherited.items()}
    pictures = {name: _picture(drawn[name], draw(plot, theme=DARK)) for name, plot in (own | inherited).items()}
    yield []
    facts = origin.facts(cost.device for cost in outcomes.costs.values())
    write_text(REPORTS / "report.html", html(comparison, outcomes, settings, layer, pictures, facts))
    yield [REPORTS / "report.html"]


def table(comparison: Comparison) -> list[Line]:
    """The one table: a column for the teacher and for each arm from the best down, a line per measure."""
    arms = [comparison.arms[name] for name in comparison.order]
    columns: list[TeacherResult] = [comparison.teacher, *arms]
    lines = [
        Line(name.replace("weights.", "weight of "), [NOTHING, *(_setting(arm.settings[name]) for arm in arms)])
        for name in arms[0].settings
    ]
    lines += [
        Line("exact match, %", _scores(columns, lambda r: (r.exact_match, r.ci95)), starts_group=True),
        Line("average over kinds, %", _scores(columns, lambda r: (r.average, r.average_ci95))),
    ]
    lines += [Line(MEASURES[name].title, [_estimate(name, column) for column in columns]) for name in comparison.measures]
    shown = plots.telling(comparison)
    lines += [
        Line(f"{plain(kind)} ({comparison.kinds[kind]:,})", _of_kind(columns, kind), starts_group=index == 0)
        for index, kind in enumerate(shown)
    ]
    for index, baseline in enumerate(plots.baselines(comparison)):
        gains = [arm.gains.get(baseline) for arm in arms]
        lines.append(Line(f"gain over {baseline}, points", [NOTHING, *map(_gain, gains)], starts_group=index == 0))
        lines.append(Line("p (Holm)", [NOTHING, *map(_p_value, gains)], belongs_above=True))
    lines.append(Line("share of the teacher, %", [Cell("100"), *map(_share, arms)], starts_group=True))
    lines.append(Line("training, s of wall clock", [NOTHING, *map(_wall_clock, arms)], starts_group=True))
    lines.append(Line("peak memory, MiB", [NOTHING, *(Cell(f"{arm.peak_memory_mib:,.0f}") for arm in arms)]))
    return lines


def by_kind(comparison: Comparison) -> str:
    """Which kinds the table leaves out, and on which the arms fall furthest behind the teacher."""
    shown = plots.telling(comparison)
    alike = [
        f"{plain(kind)} {md.percent(comparison.teacher.per_kind[kind])}%" for kind in comparison.kinds if kind not in shown
    ]
    words = (
        f"Left out are {len(alike)} of {len(comparison.kinds)} kinds, in which all are equal: {listed(alike)}." if alike else ""
    )
    scores = {kind: [arm.per_kind[kind] for arm in comparison.arms.values()] for kind in shown}
    behind = {kind: comparison.teacher.per_kind[kind] - fmean(found) for kind, found in scores.items()}
    furthest = max(behind, key=behind.__getitem__, default=None)
    if furthest is None or behind[furthest] <= 0:
        return words
    low, high, taught = map(md.percent, (min(scores[furthest]), max(scores[furthest]), comparison.teacher.per_kind[furthest]))
    theirs = low if low == high else f"{low} to {high}"
    return f"Arms fall furthest behind the teacher in {plain(furthest)}: it has {taught}%, they have {theirs}%. {words}".strip()


def plain(name: str) -> str:
    return name.replace("_", " ")


def measures(comparison: Comparison) -> list[Line]:
    """Each measure beside exact match, and every arm's difference from each baseline by it."""
    lines = []
    for name, contrast in comparison.measures.items():
        measure, best = MEASURES[name], "lower" if MEASURES[name].lower_is_better else "higher"
        cells = [_estimate(name, column) for column in (comparison.teacher, *(comparison.arms[a] for a in comparison.order))]
        lines.append(Line(f"{measure.title} ({best} is better)", cells, starts_group=True))
        for baseline in plots.baselines(comparison):
            found = [contrast.gain(arm, baseline) if arm != baseline else None for arm in comparison.order]
            lines.append(Line(f"minus {baseline}, {measure.unit}", [NOTHING, *(_gain(gain, measure) for gain in found)]))
    return lines


def small_tables(comparison: Comparison) -> dict[str, Table]:
    """Tables by name: yes/no figures, resolution of the sample, published runs beside these, seeds of each arm."""
    everyone = [(TEACHER_ARM, comparison.teacher), *((name, comparison.arms[name]) for name in comparison.order)]
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    closed = [
        [name, *(md.percent(getattr(result.yes_no[OVERALL], figure)) for figure in names)]
        for name, result in everyone
        if result.yes_no
    ]
    if len({tuple(row[1:]) for row in closed}) == 1:
        closed = [["teacher and all arms", *closed[0][1:]]]
    tables = {"yes_no": (["yes/no questions", "accuracy", "precision", "recall", "F1", "yes ratio"], closed)} if closed else {}
    rows = []
    for name, found in {EXACT_MATCH: comparison.exact_match, **comparison.measures}.items():
        gaps = (found.noise, found.detectable, found.spread)
        said = [md.DASH if gap is None else MEASURES[name].said(gap) for gap in gaps]
        rows.append([MEASURES[name].title, MEASURES[name].unit, *said])
    header = ["measure", "unit", "may be chance below", "seen four times in five", "deviation between seeds"]
    tables["resolution"] = header, rows
    if comparison.published:
        rows = []
        for name, result in everyone:
            scores = comparison.published.scores.get(name, [])
            mean = md.percent(fmean(scores)) if scores else md.DASH
            deviation = md.percent(stdev(scores)) if len(scores) > 1 else md.DASH
            rows.append([name, f"{md.percent(result.exact_match)} {_range(result.ci95)}", mean, deviation, f"{len(scores)}"])
        tables["published"] = ["", "this run, %", "published, mean, %", "deviation between seeds, points", "seeds"], rows
    if comparison.repeated:
        rows = []
        for name, arm in comparison.arms.items():
            each = ", ".join(f"{run} {md.percent(score)}" for run, score in arm.runs.items())
            rows.append([name, f"{len(arm.runs)}", each, md.percent(arm.exact_match)])
        tables["seeds"] = ["arm", "runs", "exact match of each, %", "mean, %"], rows
    return tables


def pairs(comparison: Comparison) -> list[Line]:
    """Each arm minus each that ranks below it: a line for the one, a column for the other."""
    found = {(pair.arm, pair.against): pair for pair in comparison.pairs}
    cells = {arm: [found.get((arm, other)) for other in comparison.order[1:]] for arm in comparison.order[:-1]}
    return [Line(arm, [_gain(pair) if pair else Cell("") for pair in row]) for arm, row in cells.items()]


def published_by(comparison: Comparison) -> str:
    """Recipe and machine of the published runs, in a sentence or two."""
    found = comparison.published
    if found is None:
        return ""
    words = f"Runs of recipe {found.recipe} on {found.machine}."
    return f"{words} Your params differ from the recipe in {found.differing} values." if found.differing else words


def markdown(comparison: Comparison) -> str:
    """The headline, the tables, the pairs and how it was measured."""
    small = {name: md.table(*found) for name, found in small_tables(comparison).items()}
    names = ["", TEACHER_ARM, *(marked(comparison, arm) for arm in comparison.order)]
    parts = ["# Comparison", f"**{comparison.headline}**", comparison.standing, by_kind(comparison)]
    parts = [*filter(None, parts), _of_lines(names, table(comparison))]
    if "yes_no" in small:
        parts += ["## Yes/no questions, %", small["yes_no"]]
    parts += ["## Beyond right and wrong", _of_lines(names, measures(comparison))]
    parts += ["## What this sample can tell apart", small["resolution"]]
    if "published" in small:
        parts += ["## Beside the published runs", published_by(comparison), small["published"]]
    if "seeds" in small:
        parts += ["## Seeds", small["seeds"]]
    header = ["better", "than", "by, points", "interval", "p", "p (Holm)", "p, yes/no (McNemar)", "beyond noise"]
    pairs = [
        [
            pair.arm,
            pair.against,
            gain.value,
            gain.below,
            md.p_value(pair.p_value),
            md.p_value(pair.p_holm),
            md.DASH if pair.p_mcnemar is None else md.p_value(pair.p_mcnemar),
            "measured otherwise" if pair.differs else "yes" if pair.larger_than_noise else "no",
        ]
        for pair, gain in ((pair, _gain(pair)) for pair in comparison.pairs)
    ]
    parts += ["## Every pair of arms", md.table(header, pairs), "## How it was measured", *_notes(comparison)]
    return "\n\n".join(parts) + "\n"


def html(
    comparison: Comparison,
    outcomes: Outcomes,
    settings: EvaluateSettings,
    layer: LayerChoice | None,
    pictures: dict[str, Picture],
    facts: Mapping[str, str],
) -> str:
    """The whole report as one page: every picture inside, nothing fetched. `facts`: its origin (`origin.facts`)."""
    found = disagreements({name: outcomes.predictions[name] for name in (TEACHER_ARM, *comparison.order)}, settings.seed)
    environment = templates(Path(__file__).parent)
    environment.filters |= {
        "percent": md.percent,
        "mark": partial(marked, comparison),
        "plain": plain,
    }
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        facts=facts,
        beside=BESIDE,
        wall_clock=WALL_CLOCK,
        lines=table(comparison),
        measures=measures(comparison),
        small=small_tables(comparison),
        published_by=published_by(comparison),
        noise_of=noise_of(comparison),
        unlike=unlike(comparison),
        columns=[TEACHER_ARM, *comparison.order],
        pairs=pairs(comparison),
        beyond=[pair for pair in comparison.pairs if pair.larger_than_noise],
        pictures=pictures,
        notes=_notes(comparison),
        colours={arm: (LIGHT.colour(place), DARK.colour(place)) for arm, place in places(comparison.arms).items()},
        by_kind=by_kind(comparison),
        yardstick=plots.yardstick(comparison),
        teacher=TeacherReport.read(REPORTS / "teacher" / "candidates.json"),
        teacher_plot=_file(REPORTS / "teacher" / "quality_cost.png"),
        layer=layer,
        overlays=[_file(path) for path in sorted((REPORTS / "irs").glob("overlay_*.png"))],
        examples=_examples(comparison, outcomes, found[: settings.examples]),
        disagreements=len(found),
        contact_sheet=_file(DATASET / "contact_sheet.png"),
    )


def unlike(comparison: Comparison) -> list[str]:
    """A sentence for each arm that was measured otherwise than the teacher, saying how."""
    return [
        f"{arm} was measured otherwise than the teacher ({'; '.join(result.differs)}), so its score compares with nothing here."
        for arm, result in comparison.arms.items()
        if result.differs
    ]


def marked(comparison: Comparison, arm: str) -> str:
    """The arm's name, with a dagger if it was measured otherwise than the teacher."""
    return f"{arm} \N{DAGGER}" if comparison.arms[arm].differs else arm


def disagreements(predictions: dict[str, list[Prediction]], seed: int) -> list[int]:
    """Indices of the samples that some arms got right and others wrong: in an order drawn by `seed`, kinds taking turns."""
    answers = [arm for name, arm in predictions.items() if name != TEACHER_ARM]
    divided = [i for i, row in enumerate(zip(*answers, strict=True)) if len({p.correct for p in row}) > 1]
    turns: Counter[str] = Counter()
    ranked = []
    for position in np.random.default_rng(seed).permutation(len(divided)):
        kind = answers[0][divided[position]].kind
        ranked.append((turns[kind], divided[position]))
        turns[kind] += 1
    return [index for _, index in sorted(ranked, key=lambda pair: pair[0])]


def _plots(comparison: Comparison, outcomes: Outcomes) -> dict[str, Plot]:
    found: dict[str, Plot] = {
        "scores": partial(plots.scores, comparison),
        "kinds": partial(plots.kinds, comparison),
        "measures": partial(plots.measures, comparison),
        "quality_cost": partial(plots.quality_cost, comparison),
        "losses": partial(plots.losses, comparison, outcomes.losses),
    }
    if plots.baselines(comparison):
        found["gains"] = partial(plots.gains, comparison)
    return found


def _examples(comparison: Comparison, outcomes: Outcomes, indices: list[int]) -> list[dict[str, Any]]:
    """Images, kind, question and reference of each sample, with the answers of the teacher and the arms from the best down."""
    asked = [outcomes.predictions[TEACHER_ARM][index] for index in indices]
    images = images_of(asked, comparison.split)
    return [
        {
            "images": [data_uri(thumbnail(image, EXAMPLE_PX)) for image in images[sample.id]],
            "kind": sample.kind,
            "question": with_marks(sample.question),
            "reference": sample.reference,
            "answers": [(row, outcomes.predictions[row][index]) for row in (TEACHER_ARM, *comparison.order)],
        }
        for index, sample in zip(indices, asked, strict=True)
    ]


def _notes(comparison: Comparison) -> list[str]:
    """How to read the numbers, and what they do not say."""
    return [
        *unlike(comparison),
        comparison.method,
        *filter(None, [resolution(comparison)]),
        OTHER_MEASURES,
        *(f"{scorer.title.capitalize()}: {scorer.note}." for name, scorer in SCORERS.items() if name in comparison.measures),
        OVER_SEEDS if comparison.repeated else ONE_SEED,
        f"Where two arms do not differ at all, one interval in {round(1 / (1 - comparison.confidence))} still excludes zero by"
        f" chance. There are {len(comparison.pairs)} pairs here; p (Holm) accounts for that.",
        "An arm that answers all questions of a kind right, or none, has an interval of no width there: the draws hold nothing"
        " that the sample does not.",
        f"{WALL_CLOCK} So is peak memory.",
    ]


def _inline(cell: Cell) -> str:
    value = f"**{cell.value}**" if cell.strong else cell.value
    return f"{value} {cell.below}".strip()


def _estimate(name: str, result: TeacherResult) -> Cell:
    said, found = MEASURES[name].said, result.measures[name]
    return Cell(said(found.value), f"[{said(found.ci95[0])}, {said(found.ci95[1])}]")


def _scores(columns: list[TeacherResult], figure: Callable[[TeacherResult], tuple[float, Interval]]) -> list[Cell]:
    return [Cell(md.percent(value), _range(interval)) for value, interval in map(figure, columns)]


def _of_kind(columns: list[TeacherResult], kind: str) -> list[Cell]:
    """Exact match, with token F1 below it where the kind has answers of several words."""
    f1 = [column.measures["token_f1"].per_kind[kind] for column in columns]
    partly = any(abs(value - column.per_kind[kind]) > 5e-4 for value, column in zip(f1, columns, strict=True))
    return [
        Cell(md.percent(column.per_kind[kind]), f"F1 {md.percent(value)}" if partly else "")
        for value, column in zip(f1, columns, strict=True)
    ]


def _gain(gain: Difference | None, measure: Measure = MEASURES[EXACT_MATCH]) -> Cell:
    if gain is None:
        return NOTHING
    low, high = map(measure.difference, gain.ci95)
    return Cell(measure.difference(gain.difference), f"[{low}, {high}]", strong=gain.larger_than_noise)


def _p_value(gain: Difference | None) -> Cell:
    return NOTHING if gain is None else Cell(md.p_value(gain.p_value), f"({md.p_value(gain.p_holm)})")


def _share(arm: ArmResult) -> Cell:
    if arm.share_of_teacher is None or arm.share_ci95 is None:
        return NOTHING
    return Cell(md.percent(arm.share_of_teacher), _range(arm.share_ci95))


def _range(interval: Interval) -> str:
    return f"[{md.percent(interval[0])}, {md.percent(interval[1])}]"


def _setting(value: Any) -> Cell:
    return NOTHING if value is None else Cell(f"{value:g}" if isinstance(value, float) else str(value))


def _wall_clock(arm: ArmResult) -> Cell:
    said = f"{arm.train_seconds:,.0f}" if arm.train_seconds >= 10 else f"{arm.train_seconds:.1f}"
    return Cell(said, f"{arm.train_seconds / arm.steps:.3g} per step")


def _of_lines(names: list[str], lines: list[Line]) -> str:
    return md.table(names, [[line.label, *map(_inline, line.cells)] for line in lines])


def _picture(light: bytes, dark: bytes) -> Picture:
    with Image.open(io.BytesIO(light)) as image:
        width = round(image.width * CSS_PX_PER_INCH / DPI)
    return Picture(data_uri(light), data_uri(dark), width)


def _file(path: Path) -> Picture:
    """A picture of an earlier stage, the same on a light and on a dark page."""
    try:
        return _picture(path.read_bytes(), path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing; `dvc repro` makes it") from None


def _written(path: Path, content: bytes) -> Path:
    write_bytes(path, content)
    return path
