"""Report of the comparison: plots, a Markdown table, and one self-contained HTML file."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from components.config.evaluate import EvaluateSettings
from components.evaluate import origin, plots, report_notes, report_tables
from components.evaluate.headline import noise_of
from components.evaluate.load_results import Outcomes, images_of
from components.evaluate.report_tables import Cell, Line, plain
from components.io import write_bytes, write_text
from components.irs.overlays import curve
from components.models.rendered import with_marks
from components.records.compare import Comparison
from components.records.evaluate import Prediction
from components.records.irs import LayerChoice
from components.records.paths import DATASET, REPORTS, TEACHER_ARM
from components.records.record import content
from components.records.teacher import TeacherReport
from components.report import markdown as md
from components.report.figures import DARK, DPI, LIGHT, draw, series_indices
from components.report.pages import data_uri, templates, thumbnail

Plot = Callable[..., Figure]  # figure for a theme

OTHER_PAGES = {  # command -> page
    "samples": "all answers",
    "controls": "controls without the image",
    "leaderboard": "leaderboard",
}
EXAMPLE_PX = 480  # longest side of an example's image in the report; smaller images are not resized
CSS_PX_PER_INCH = 104


@dataclass(frozen=True)
class Picture:
    """Image as data URIs, for a light and a dark page, with the width in CSS pixels at which its font size matches the text."""

    light: str
    dark: str
    width: int


def write(comparison: Comparison, outcomes: Outcomes, settings: EvaluateSettings) -> list[Path]:
    """Write the plots, compare.md and report.html under `reports/`; returns their paths.

    Raises DataError if a picture or record of an earlier stage is missing.
    """
    own_plots = _plots(comparison, outcomes)
    layer = LayerChoice.read_if_searched()
    irs_plots: dict[str, Plot] = {"irs": partial(curve, layer)} if layer else {}  # search_layer's plot, in both themes
    bar = tqdm((own_plots | irs_plots).items(), desc="compare", unit="plot")
    images = {name: (draw(plot), draw(plot, theme=DARK)) for name, plot in bar}
    for name in own_plots:
        write_bytes(REPORTS / "plots" / f"{name}.png", images[name][0])
    write_text(REPORTS / "compare.md", markdown(comparison))
    pictures = {name: _picture(*themes) for name, themes in images.items()}
    facts = origin.facts(cost.device for cost in outcomes.costs.values())
    write_text(REPORTS / "report.html", html(comparison, outcomes, settings, layer, pictures, facts))
    return [*(REPORTS / "plots" / f"{name}.png" for name in own_plots), REPORTS / "compare.md", REPORTS / "report.html"]


def markdown(comparison: Comparison) -> str:
    """Headline, tables, pairs and notes on the method, as Markdown."""
    small_tables = {name: md.table(*small_table) for name, small_table in report_tables.small_tables(comparison).items()}
    names = ["", TEACHER_ARM, *(arm_label(comparison, arm) for arm in comparison.order)]
    parts = ["# Comparison", f"**{comparison.headline}**", comparison.standing, report_notes.by_kind(comparison)]
    parts = [*filter(None, parts), _lines_table(names, report_tables.table(comparison))]
    if "yes_no" in small_tables:
        parts += ["## Yes/no questions, %", small_tables["yes_no"]]
    parts += ["## Beyond right and wrong", _lines_table(names, report_tables.measures(comparison))]
    parts += ["## What this sample can tell apart", small_tables["resolution"]]
    if "published" in small_tables:
        parts += ["## Beside the published runs", report_notes.published_source(comparison), small_tables["published"]]
    if "seeds" in small_tables:
        parts += ["## Seeds", small_tables["seeds"]]
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
        for pair, gain in ((pair, report_tables.gain_cell(pair)) for pair in comparison.pairs)
    ]
    parts += ["## Every pair of arms", md.table(header, pairs), "## How it was measured", *report_notes.notes(comparison)]
    return "\n\n".join(parts) + "\n"


def html(
    comparison: Comparison,
    outcomes: Outcomes,
    settings: EvaluateSettings,
    layer: LayerChoice | None,
    pictures: dict[str, Picture],
    facts: Mapping[str, str],
) -> str:
    """Report as one self-contained HTML page, pictures inlined. `facts`: its origin (`origin.facts`)."""
    indices = disagreements({name: outcomes.predictions[name] for name in comparison.results}, settings.seed)
    environment = templates(Path(__file__).parent)
    environment.filters |= {"percent": md.percent, "mark": partial(arm_label, comparison), "plain": plain}
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        facts=facts,
        other_pages=OTHER_PAGES,
        tables=report_tables,
        small=report_tables.small_tables(comparison),
        sentences=report_notes,
        by_kind=report_notes.by_kind(comparison),
        noise_of=noise_of(comparison),
        pictures=pictures,
        colours={arm: (LIGHT.colour(index), DARK.colour(index)) for arm, index in series_indices(comparison.arms).items()},
        yardstick=plots.yardstick(comparison),
        kinds_differ=bool(plots.differing_kinds(comparison)),
        teacher=TeacherReport.read(REPORTS / "teacher" / "candidates.json"),
        teacher_plot=_load_picture(REPORTS / "teacher" / "quality_cost.png"),
        layer=layer,
        overlays=[_load_picture(path) for path in sorted((REPORTS / "irs").glob("overlay_*.png"))],
        examples=_examples(comparison, outcomes, indices[: settings.examples]),
        disagreements=len(indices),
        contact_sheet=_load_picture(DATASET / "contact_sheet.png"),
    )


def arm_label(comparison: Comparison, arm: str) -> str:
    """Arm's name, with a dagger if its fingerprint differs from the teacher's."""
    return f"{arm} \N{DAGGER}" if comparison.arms[arm].differs else arm


def disagreements(predictions: dict[str, list[Prediction]], seed: int) -> list[int]:
    """Indices of the samples that some arms answer right and others wrong: in random order (`seed`), round-robin over kinds."""
    answers = [arm for name, arm in predictions.items() if name != TEACHER_ARM]
    disagreeing = [i for i, row in enumerate(zip(*answers, strict=True)) if len({p.correct for p in row}) > 1]
    kind_counts: Counter[str] = Counter()
    ranked = []
    for position in np.random.default_rng(seed).permutation(len(disagreeing)):
        kind = answers[0][disagreeing[position]].kind
        ranked.append((kind_counts[kind], disagreeing[position]))
        kind_counts[kind] += 1
    return [index for _, index in sorted(ranked, key=lambda pair: pair[0])]


def _plots(comparison: Comparison, outcomes: Outcomes) -> dict[str, Plot]:
    by_name: dict[str, Plot] = {
        "scores": partial(plots.scores, comparison),
        "kinds": partial(plots.kinds, comparison),
        "measures": partial(plots.measures, comparison),
        "quality_cost": partial(plots.quality_cost, comparison),
        "losses": partial(plots.losses, comparison, outcomes.losses),
    }
    if plots.baselines(comparison):
        by_name["gains"] = partial(plots.gains, comparison)
    return by_name


def _examples(comparison: Comparison, outcomes: Outcomes, indices: list[int]) -> list[dict[str, Any]]:
    """Images, kind, question and reference of each sample, with the answers of the teacher and the arms from the best down."""
    questions = [outcomes.predictions[TEACHER_ARM][index] for index in indices]
    images = images_of(questions, comparison.split)
    return [
        {
            "images": [data_uri(thumbnail(image, EXAMPLE_PX)) for image in images[sample.id]],
            "kind": sample.kind,
            "question": with_marks(sample.question),
            "reference": sample.reference,
            "answers": [(name, outcomes.predictions[name][index]) for name in comparison.results],
        }
        for index, sample in zip(indices, questions, strict=True)
    ]


def _lines_table(names: list[str], lines: list[Line]) -> str:
    return md.table(names, [[line.label, *map(_inline, line.cells)] for line in lines])


def _inline(cell: Cell) -> str:
    value = f"**{cell.value}**" if cell.strong else cell.value
    return f"{value} {cell.below}".strip()


def _picture(light: bytes, dark: bytes) -> Picture:
    uris = data_uri(light), data_uri(dark)  # raises if one does not decode
    with Image.open(io.BytesIO(light)) as image:
        width = round(image.width * CSS_PX_PER_INCH / DPI)
    return Picture(*uris, width)


def _load_picture(path: Path) -> Picture:
    """Picture of an earlier stage, the same file for light and dark pages."""
    picture = content(path)
    return _picture(picture, picture)
