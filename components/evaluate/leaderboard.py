"""Leaderboard: our students and their teacher beside the published rows, with notes on comparability.

Our rows are scored on our own test questions, the published ones on the paper's six benchmarks: the two share a page, not a
table. Our scores on the six come from VLMEvalKit (`alignti evaluate --kit vlmeval --task`). A dash marks a missing
measurement.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from statistics import fmean, median_high
from types import MappingProxyType
from typing import Any

from components.config.study import Arm
from components.errors import DataError
from components.evaluate.benchmarks import BENCHMARKS, PAPER
from components.evaluate.speed import Speed, SpeedReport
from components.evaluate.statistics import noise_unpaired
from components.io import write_table, write_text
from components.records.compare import Comparison
from components.records.models import ModelIndex
from components.records.paths import REPORTS, TEACHER_ARM
from components.records.record import Record
from components.records.teacher import TeacherChoice
from components.report.markdown import DASH, signed, table
from components.report.pages import templates

PUBLISHED = Path(__file__).with_name("published.csv")
SFT, KD = "SFT", "Vanilla KD"  # the published baselines, by method

FIGURES = {  # benchmark -> suffix of VLMEvalKit's figure, factor from its unit to the paper's
    "gqa": ("/Overall", 1.0),
    "sqa": ("/Overall", 100.0),
    "textvqa": ("/Overall", 1.0),
    "pope": ("/Overall/Overall", 1.0),  # F1
    "mme": ("/perception", 1 / 20),  # percent of 2,000 points
    "mmb": ("/Overall", 100.0),
}
SEPARATE_NOTE = "Our models answer our own test questions, the published ones the paper's benchmarks: the two do not compare."
KIT_NOTE = (
    "Scores of ours on the six are VLMEvalKit's, by its prompts and its rules without a judge, which are not the paper's"
    " (docs/evaluation.md): what they differ by from a published one is not the model's alone."
)


class Row(Record):
    """Row of one model. Scores in percent; gains relative to the baseline's score, in percent of it."""

    group: str  # teacher, student; align_ti, baseline, peer, ablation, cost
    name: str
    ours: bool
    own: float | None = None  # exact match on our test questions
    own_ci95: tuple[float, float] | None = None
    scores: dict[str, float | None]  # scores on the paper's six benchmarks
    average: float | None = None
    gain_sft: float | None = None
    gain_kd: float | None = None
    parameters: int | None = None
    tokens_per_second: float | None = None
    first_token_ms: float | None = None
    memory_mib: float | None = None
    note: str = ""
    source: str


class Leaderboard(Record):
    """reports/leaderboard.json"""

    own_questions: str  # description of our questions
    rows: list[Row]
    noise: dict[str, float | None]  # benchmark -> largest gap between two published scores that may be noise, points
    notes: list[str]


def build(
    comparison: Comparison, index: ModelIndex, teacher: TeacherChoice, study: Mapping[str, Arm], speed: SpeedReport | None,
    kit: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> Leaderboard:  # fmt: skip
    """Our rows, teacher first and arms from the best down, then the published ones in their file's order.

    `kit`: VLMEvalKit's figures of each of our models, `benchmark/figure` -> value (components/evaluate/kits/table.py).
    """
    published, speeds = read_published(), speed.models if speed is not None else {}
    if teacher.name not in index.teachers:
        raise DataError(f"artifacts/models/index.json has no teacher {teacher.name!r}; `dvc repro` makes both anew")
    if gone := [arm for arm in comparison.order if arm not in study or study[arm].student not in index.students]:
        raise DataError(
            f"reports/compare.json has the arm {gone[0]}, which params/study.yaml or artifacts/models/index.json has not;"
            " `dvc repro` compares anew"
        )
    models = {TEACHER_ARM: index.teachers[teacher.name]} | {a: index.students[study[a].student] for a in comparison.order}
    rows = [
        _model_row(name, comparison, model.parameters, speeds.get(name), kit.get(name, {})) for name, model in models.items()
    ]
    notes = _notes(comparison, speed) + ([KIT_NOTE] if any(value for row in rows for value in row.scores.values()) else [])
    return Leaderboard(
        own_questions=f"{comparison.n:,} {comparison.split} questions about {comparison.images:,} images",
        rows=rows + published,
        noise=_noise(published, comparison.confidence),
        notes=notes,
    )


def read_published() -> list[Row]:
    """Published rows, each with its source; gains are over the baseline of the same backbone."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    baselines = {(line["method"], line["backbone"]): float(line["average"]) for line in lines if line["group"] == "baseline"}

    def gain(line: dict[str, str], method: str) -> float | None:
        baseline = baselines.get((method, line["backbone"])) if line["method"] != method else None
        return None if baseline is None or not line["average"] else relative_gain(float(line["average"]), baseline)

    return [
        Row(
            group=line["group"],
            name=f"{line['method']} {line['backbone']}".strip(),
            ours=False,
            scores={name: _number(line[name]) for name in PAPER},
            average=_number(line["average"]),
            gain_sft=gain(line, SFT),
            gain_kd=gain(line, KD),
            note=line["note"],
            source=line["source"],
        )
        for line in lines
    ]


def relative_gain(average: float, baseline: float) -> float:
    """Relative gain as in the paper, percent of the baseline: from averages rounded half up to one decimal, then rounded."""
    return _rounded(100 * (_rounded(average) / _rounded(baseline) - 1))


def _rounded(value: float) -> float:
    return float(Decimal(str(round(value, 6))).quantize(Decimal("0.1"), ROUND_HALF_UP))


def _model_row(name: str, comparison: Comparison, parameters: int, speed: Speed | None, figures: Mapping[str, float]) -> Row:
    result = comparison.results[name]
    low, high = result.ci95
    scores = {benchmark: _benchmark_score(benchmark, figures) for benchmark in PAPER}
    benchmark_scores = [value for value in scores.values() if value is not None]
    return Row(
        group="teacher" if name == TEACHER_ARM else "student",
        name=name,
        ours=True,
        own=100 * result.exact_match,
        own_ci95=(100 * low, 100 * high),
        scores=scores,
        average=fmean(benchmark_scores) if len(benchmark_scores) == len(PAPER) else None,
        gain_sft=_own_gain(comparison, name, "sft"),
        gain_kd=_own_gain(comparison, name, "kd"),
        parameters=parameters,
        note=f"measured otherwise than the teacher: {'; '.join(result.differs)}" if result.differs else "",
        source="measured here",
        **(speed.model_dump(include={"tokens_per_second", "first_token_ms", "memory_mib"}) if speed else {}),
    )


def _own_gain(comparison: Comparison, arm: str, base: str) -> float | None:
    """Exact match relative to the arm `base`; None if the two are no pair or their fingerprints differ."""
    pair = comparison.exact_match.gain(arm, base)
    if pair is None or pair.differs or not comparison.arms[base].exact_match:
        return None
    return relative_gain(100 * comparison.arms[arm].exact_match, 100 * comparison.arms[base].exact_match)


def _benchmark_score(name: str, figures: Mapping[str, float]) -> float | None:
    """Score in the paper's unit, from the kit's own file only."""
    prefix, (suffix, factor) = f"{BENCHMARKS[name].kit_dataset}/", FIGURES[name]
    matches = [value for key, value in figures.items() if key.startswith(prefix) and key.endswith(suffix)]
    return matches[0] * factor if len(matches) == 1 else None


def _noise(published: Iterable[Row], confidence: float) -> dict[str, float | None]:
    """Noise per benchmark, at the median published score; None where the score is no share of independent questions."""
    noise: dict[str, float | None] = {}
    for name in PAPER:
        scores = [score for row in published if (score := row.scores[name]) is not None]
        items = BENCHMARKS[name].independent
        noise[name] = 100 * noise_unpaired(median_high(scores) / 100, items, confidence) if items else None
    return noise


def _notes(comparison: Comparison, speed: SpeedReport | None) -> list[str]:
    speed_note = (
        f"Speed: {speed.questions} questions to each model in one run on {next(iter(speed.models.values())).device}."
        if speed is not None and speed.models
        else "Speed and memory were not measured: `alignti leaderboard --measure` does."
    )
    return [
        "Relative gain as the paper computes it: from averages with one decimal, percent of the same backbone's baseline.",
        f"Noise: a gap between published scores below it may be chance ({comparison.confidence:.0%}), questions taken for"
        " independent and unpaired, as nobody published the answers one by one. For POPE it is that of accuracy; MME sums"
        " pairs and MMBench asks each question in every order, so theirs is not known.",
        "Which of our gains are larger than the noise, and that of our sample: compare.md.",
        speed_note,
    ]


def cells(row: Row, noise: Mapping[str, float | None]) -> dict[str, str]:
    """Formatted cells of a row by the title of their column, which has the noise of its benchmark."""
    low, high = row.own_ci95 or (0.0, 0.0)
    noise_labels = {name: "" if gap is None else f" (±{gap:.1f})" for name, gap in noise.items()}
    return {
        "model": row.name,
        "exact match, %": _format(row.own, f"{{:.1f}} [{low:.1f}, {high:.1f}]"),
        **{BENCHMARKS[name].title + noise_labels[name]: _format(score) for name, score in row.scores.items()},
        "average": _format(None if row.average is None else _rounded(row.average)),
        "over SFT, % of it": DASH if row.gain_sft is None else signed(row.gain_sft),
        "over KD, % of it": DASH if row.gain_kd is None else signed(row.gain_kd),
        "parameters": _format(row.parameters, "{:,}"),
        "tokens/s": _format(row.tokens_per_second, "{:,.0f}"),
        "first token, ms": _format(row.first_token_ms),
        "memory, MiB": _format(row.memory_mib, "{:,.0f}"),
    }


def _format(value: float | None, spec: str = "{:.1f}") -> str:
    return DASH if value is None else spec.format(value)


def sections(board: Leaderboard) -> list[tuple[str, list[str], list[tuple[Row, list[str]]]]]:
    """Our rows, then the published ones: title, header, and each row with its cells; columns empty in a half are dropped."""
    result = []
    for title, ours in ((f"Ours, on {board.own_questions}", True), ("Published, on the paper's benchmarks", False)):
        rows = [(row, cells(row, board.noise)) for row in board.rows if row.ours == ours]
        columns = [name for name in rows[0][1] if any(row_cells[name] != DASH for _, row_cells in rows)]
        result.append((title, columns, [(row, [row_cells[name] for name in columns]) for row, row_cells in rows]))
    return result


def markdown(board: Leaderboard) -> str:
    """Both tables, with notes, sources and remarks."""
    sources = sorted({row.source for row in board.rows if not row.ours})
    remarks = [f"- {row.name}: {row.note}" for row in board.rows if row.note]
    parts = [
        "# Leaderboard",
        SEPARATE_NOTE,
        *(
            part
            for title, names, rows in sections(board)
            for part in (f"## {title}", table(names, [row_cells for _, row_cells in rows]))
        ),
        *board.notes,
        "Sources: " + "; ".join(sources) + ".",
        "\n".join(remarks),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def csv_rows(board: Leaderboard) -> list[dict[str, Any]]:
    """Every row of the CSV, unrounded."""
    rows = []
    for row in board.rows:
        low, high = row.own_ci95 or (None, None)
        rows.append({**row.model_dump(exclude={"scores", "own_ci95"}), "own_low": low, "own_high": high, **row.scores})
    return rows


def page(board: Leaderboard) -> str:
    """Both tables as one self-contained HTML file."""
    template = templates(Path(__file__).parent).get_template("leaderboard.html.j2")
    return template.render(board=board, separate_note=SEPARATE_NOTE, sections=sections(board))


def write(board: Leaderboard) -> list[Path]:
    """Write reports/leaderboard.{md,csv,html,json}; returns their paths."""
    md, sheet, html, json = (REPORTS / f"leaderboard.{kind}" for kind in ("md", "csv", "html", "json"))
    write_text(md, markdown(board))
    write_text(html, page(board))
    return [md, write_table(sheet, csv_rows(board)), html, board.write(json)]


def _number(text: str) -> float | None:
    return float(text) if text else None
