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
from components.models.template import with_marks
from components.records.compare import Comparison
from components.records.evaluate import Prediction
from components.records.irs import LayerChoice
from components.records.paths import DATASET, REPORTS, TEACHER_ARM
from components.records.record import content
from components.records.teacher import TeacherReport
from components.report import markdown as md
from components.report.figures import DARK, DPI, LIGHT, draw, places
from components.report.pages import data_uri, templates, thumbnail

Plot = Callable[..., Figure]  # figure for a theme

BESIDE = {"samples": "all answers", "controls": "controls without the image", "leaderboard": "leaderboard"}  # command -> page
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
    own = _plots(comparison, outcomes)
    layer = LayerChoice.found()
    inherited: dict[str, Plot] = {"irs": partial(curve, layer)} if layer else {}  # search_layer's plot, in both themes
    named = tqdm((own | inherited).items(), desc="compare", unit="plot")
    drawn = {name: (draw(plot), draw(plot, theme=DARK)) for name, plot in named}
    for name in own:
        write_bytes(REPORTS / "plots" / f"{name}.png", drawn[name][0])
    write_text(REPORTS / "compare.md", markdown(comparison))
    pictures = {name: _picture(*both) for name, both in drawn.items()}
    facts = origin.facts(cost.device for cost in outcomes.costs.values())
    write_text(REPORTS / "report.html", html(comparison, outcomes, settings, layer, pictures, facts))
    return [*(REPORTS / "plots" / f"{name}.png" for name in own), REPORTS / "compare.md", REPORTS / "report.html"]


def markdown(comparison: Comparison) -> str:
    """Headline, tables, pairs and notes on the method, as Markdown."""
    small = {name: md.table(*found) for name, found in report_tables.small_tables(comparison).items()}
    names = ["", TEACHER_ARM, *(marked(comparison, arm) for arm in comparison.order)]
    parts = ["# Comparison", f"**{comparison.headline}**", comparison.standing, report_notes.by_kind(comparison)]
    parts = [*filter(None, parts), _of_lines(names, report_tables.table(comparison))]
    if "yes_no" in small:
        parts += ["## Yes/no questions, %", small["yes_no"]]
    parts += ["## Beyond right and wrong", _of_lines(names, report_tables.measures(comparison))]
    parts += ["## What this sample can tell apart", small["resolution"]]
    if "published" in small:
        parts += ["## Beside the published runs", report_notes.published_by(comparison), small["published"]]
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
        for pair, gain in ((pair, report_tables.gained(pair)) for pair in comparison.pairs)
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
    found = disagreements({name: outcomes.predictions[name] for name in comparison.results}, settings.seed)
    environment = templates(Path(__file__).parent)
    environment.filters |= {"percent": md.percent, "mark": partial(marked, comparison), "plain": plain}
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        facts=facts,
        beside=BESIDE,
        tables=report_tables,
        small=report_tables.small_tables(comparison),
        sentences=report_notes,
        by_kind=report_notes.by_kind(comparison),
        noise_of=noise_of(comparison),
        pictures=pictures,
        colours={arm: (LIGHT.colour(place), DARK.colour(place)) for arm, place in places(comparison.arms).items()},
        yardstick=plots.yardstick(comparison),
        teacher=TeacherReport.read(REPORTS / "teacher" / "candidates.json"),
        teacher_plot=_file(REPORTS / "teacher" / "quality_cost.png"),
        layer=layer,
        overlays=[_file(path) for path in sorted((REPORTS / "irs").glob("overlay_*.png"))],
        examples=_examples(comparison, outcomes, found[: settings.examples]),
        disagreements=len(found),
        contact_sheet=_file(DATASET / "contact_sheet.png"),
    )


def marked(comparison: Comparison, arm: str) -> str:
    """Arm's name, with a dagger if its fingerprint differs from the teacher's."""
    return f"{arm} \N{DAGGER}" if comparison.arms[arm].differs else arm


def disagreements(predictions: dict[str, list[Prediction]], seed: int) -> list[int]:
    """Indices of the samples that some arms answer right and others wrong: in random order (`seed`), round-robin over kinds."""
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
            "answers": [(name, outcomes.predictions[name][index]) for name in comparison.results],
        }
        for index, sample in zip(indices, asked, strict=True)
    ]


def _of_lines(names: list[str], lines: list[Line]) -> str:
    return md.table(names, [[line.label, *map(_inline, line.cells)] for line in lines])


def _inline(cell: Cell) -> str:
    value = f"**{cell.value}**" if cell.strong else cell.value
    return f"{value} {cell.below}".strip()


def _picture(light: bytes, dark: bytes) -> Picture:
    with Image.open(io.BytesIO(light)) as image:
        width = round(image.width * CSS_PX_PER_INCH / DPI)
    return Picture(data_uri(light), data_uri(dark), width)


def _file(path: Path) -> Picture:
    """Picture of an earlier stage, the same file for light and dark pages."""
    picture = content(path)
    return _picture(picture, picture)
