"""Report of a study as Markdown, CSV and one self-contained HTML page: reports/studies/NAME/."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from components.io import write_bytes, write_text
from components.records.paths import REPORTS
from components.report import markdown as md
from components.report.figures import draw
from components.report.pages import data_uri, templates
from components.study import plots
from components.study.compare import SLACK, Estimate, StudyResult, abbreviate, equal_compute
from components.study.runs import write_csv

FOLDER = REPORTS / "studies"
PICTURES = {  # file -> heading, figure
    "differences.png": ("Differences with their intervals, in colour those that hold after Holm", plots.differences),
    "runs.png": ("Every run: what was varied, what it cost, what it scored", plots.parallel_coordinates),
    "pareto.png": ("Score against cost", plots.pareto),
}
NOTHING_LEARNT = "no run answered a question right, so nothing was learnt and none is the best"

Table = tuple[str, str, list[str], list[list[str]]]  # heading, note, header, rows


def write(result: StudyResult, about: str, confidence: float) -> list[Path]:
    """Write compare.md, compare.csv, compare.html and the PNGs; returns the paths of the first three.

    A study with too many factors for parallel coordinates has no runs.png, one without a comparison no differences.png."""
    tables = _tables(result, confidence)
    drawable = {"differences.png": bool(result.tests), "runs.png": len(result.factors) <= plots.MAX_AXES}
    names = [name for name in PICTURES if drawable.get(name, True)]
    pictures = {name: draw(PICTURES[name][1], result) for name in names}
    page = templates(Path(__file__).parent).get_template("compare.html.j2")
    embedded = [(PICTURES[name][0], data_uri(picture)) for name, picture in pictures.items()]
    html = page.render(result=result, about=about, standing=standing(result), tables=tables, pictures=embedded)
    folder = FOLDER / result.study
    write_text(folder / "compare.md", _markdown(result, about, tables, pictures))
    write_csv(folder / "compare.csv", result.runs)
    write_text(folder / "compare.html", html)
    for name in PICTURES:
        if name in pictures:
            write_bytes(folder / name, pictures[name])
        else:
            (folder / name).unlink(missing_ok=True)  # of the study as it was
    return [folder / f"compare.{ending}" for ending in ("md", "csv", "html")]


def standing(result: StudyResult) -> str:
    """Best variant, significant differences, missing cells and superseded runs, in a few sentences."""
    best = result.variants[0]
    leads = f"the best is {best.name} with {best.score.mean:.1%}" if best.score.mean else NOTHING_LEARNT
    text = f"{len(result.runs)} runs of {len(result.variants)} variants; {leads}."
    significant = [t for tests in result.tests.values() for t in tests if t.significant]
    text += " Different beyond chance (Holm, 5%): "
    text += ", ".join(f"{t.variant} against {t.against}" for t in significant) + "." if significant else "none."
    if result.missing:
        text += f" Missing: {abbreviate(result.missing)}."
    if result.superseded:
        text += f" {result.superseded} older or unasked-for runs are left out."
    return text


def _tables(result: StudyResult, confidence: float) -> list[Table]:
    interval_header = f"{confidence:.0%} interval"
    energy = {"GPU Wh": [v.gpu_wh for v in result.variants], "processor Wh": [v.cpu_wh for v in result.variants]}
    measured = {name: values for name, values in energy.items() if any(value is not None for value in values)}
    variants = [
        [v.name, f"{v.score.mean:.1%}", _interval(v.score), str(v.score.n), plots.duration(v.hours), f"{v.memory_mib:,.0f}",
         *(md.DASH if values[i] is None else f"{values[i]:.3g}" for values in measured.values()),
         "yes" if v.best_at_its_cost else ""]
        for i, v in enumerate(result.variants)
    ]  # fmt: skip
    effects = [
        [e.factor, f"{e.reference} to {e.level}", _points(e.effect.mean), _interval(e.effect), str(e.effect.n)]
        for e in result.effects
    ]
    equal = []
    for variant, rival in equal_compute(result.variants):
        comparison = ["nothing else is as cheap", md.DASH, md.DASH]
        if rival is not None:
            comparison = [rival.name, plots.duration(rival.hours), _points(variant.score.mean - rival.score.mean)]
        equal.append([variant.name, plots.duration(variant.hours), *comparison])
    return [
        (
            "Variants",
            "Mean over seeds, with the t interval; the last column: no other variant scores as much in as little time."
            + (" Energy of the training; the processor's is of all that ran on the machine meanwhile." if measured else ""),
            ["variant", "exact match", interval_header, "seeds", "device time", "peak MiB", *measured, "best at its cost"],
            variants,
        ),
        *(
            (
                family,
                "Points of exact match over the seeds that both ran; paired t test, adjusted for all tests here (Holm).",
                ["variant", "against", "difference", interval_header, "seeds", "p", "p (Holm)"],
                [
                    [t.variant, t.against, _points(d.mean), _interval(d), str(d.n), *map(_p, (t.p_value, t.p_holm))]
                    for t, d in ((test, test.difference) for test in tests)
                ],
            )
            for family, tests in result.tests.items()
        ),
        (
            "Main effects",
            "Points of exact match over pairs of runs that agree in all else; pairs that share a factor's other levels are not"
            " independent of one another where effects depend on them.",
            ["factor", "from, to", "effect", interval_header, "pairs"],
            effects,
        ),
        (
            "At equal compute",
            f"Each variant against the best other that took no more device time ({SLACK:.0%} of slack); points.",
            ["variant", "device time", "best for as much or less", "its time", "difference"],
            equal,
        ),
    ]


def _markdown(result: StudyResult, about: str, tables: Sequence[Table], pictures: Iterable[str]) -> str:
    parts = [f"# Study {result.study}", about, standing(result)]
    for heading, note, head, rows in tables:
        parts += [f"## {heading}", note, md.table(head, rows)]
    return "\n\n".join([*parts, *(f"![{Path(picture).stem}]({picture})" for picture in pictures)]) + "\n"


def _interval(estimate: Estimate) -> str:
    if estimate.interval is None:
        return "one value"
    return " to ".join(f"{plots.POINTS * bound:.2f}" for bound in estimate.interval)


def _points(share: float) -> str:
    return md.signed(plots.POINTS * share, 2)


def _p(value: float | None) -> str:
    return md.DASH if value is None else md.p_value(value)
