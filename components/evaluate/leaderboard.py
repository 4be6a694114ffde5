"""Leaderboard: our students and their teacher beside the published rows, with what may be compared.

Our rows are scored on our own test questions, the published ones on the paper's six benchmarks: the two halves share a page,
not a column. A score of ours on one of the six is what VLMEvalKit said of it (`alignti evaluate --kit vlmeval --task`). What
was not measured is a dash.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from statistics import fmean
from types import MappingProxyType

from components.config.study import Arm
from components.errors import DataError
from components.evaluate.benchmarks import BENCHMARKS, PAPER
from components.evaluate.pages import templates
from components.evaluate.speed import SPEED, Speed, SpeedReport
from components.evaluate.statistics import noise_unpaired
from components.io import write_text
from components.records.compare import Comparison
from components.records.models import ModelIndex
from components.records.paths import REPORTS, TEACHER_ARM
from components.records.record import Record
from components.records.teacher import TeacherChoice
from components.report.markdown import DASH, signed, table

PUBLISHED = Path(__file__).with_name("published.csv")
SFT, KD = "SFT", "Vanilla KD"  # the published baselines, by method
FORMATS = ("md", "csv", "html", "json")

FIGURES = {  # which of VLMEvalKit's figures is the benchmark's, and what a unit of it is worth in the paper's
    "gqa": ("/Overall", 1.0),
    "sqa": ("/Overall", 100.0),
    "textvqa": ("/Overall", 1.0),
    "pope": ("/Overall/Overall", 1.0),  # F1
    "mme": ("/perception", 1 / 20),  # percent of 2,000 points
    "mmb": ("/Overall", 100.0),
}
KIT_NOTE = (
    "Scores of ours on the six are VLMEvalKit's, by its prompts and its rules without a judge, which are not the paper's"
    " (docs/evaluation.md): what they differ by from a published one is not the model's alone."
)


class Row(Record):
    """One model. Scores in percent; a gain is relative to the baseline's score, in percent of it."""

    group: str  # teacher, student; align_ti, baseline, peer, ablation, cost
    name: str
    ours: bool
    own: float | None = None  # exact match on our test questions
    own_ci95: tuple[float, float] | None = None
    scores: dict[str, float | None]  # on the paper's six
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
    noise: dict[str, float | None]  # per benchmark: gap between two published scores that is noise, points
    notes: list[str]


@dataclass(frozen=True)
class Published:
    """One line of published.csv."""

    group: str
    method: str
    backbone: str
    scores: dict[str, float | None]
    average: float | None
    note: str
    source: str


def build(
    comparison: Comparison, index: ModelIndex, teacher: TeacherChoice, study: Mapping[str, Arm], speed: SpeedReport | None,
    kit: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> Leaderboard:  # fmt: skip
    """Our rows, teacher first and arms from the best down, then the published ones in their file's order.

    `kit`: what VLMEvalKit said of each of our models, `benchmark/figure` -> value (components/evaluate/kits/table.py).
    """
    published = read_published()
    measured = speed.models if speed is not None else {}
    rows = [_teacher(comparison, index, teacher, measured), *_students(comparison, index, study, measured)]
    rows = [row.model_copy(update=_on_the_six(kit.get(row.name, {}))) for row in rows]
    notes = _notes(comparison, speed) + ([KIT_NOTE] if any(value for row in rows for value in row.scores.values()) else [])
    rows += [_published(row, published) for row in published]
    return Leaderboard(
        own_questions=f"{comparison.n:,} {comparison.split} questions about {comparison.images:,} images",
        rows=rows,
        noise=_noise(published, comparison.confidence),
        notes=notes,
    )


def read_published(path: Path = PUBLISHED) -> list[Published]:
    """The rows that others measured, each with its source."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Published(
                group=line["group"],
                method=line["method"],
                backbone=line["backbone"],
                scores={name: _number(line[name]) for name in PAPER},
                average=_number(line["average"]),
                note=line["note"],
                source=line["source"],
            )
            for line in csv.DictReader(file)
        ]


def relative_gain(average: float, baseline: float) -> float:
    """As the paper computes it, percent of the baseline: from averages rounded half up to one decimal, then rounded."""
    return _rounded(100 * (_rounded(average) / _rounded(baseline) - 1))


def _rounded(value: float) -> float:
    return float(Decimal(str(round(value, 6))).quantize(Decimal("0.1"), ROUND_HALF_UP))


def _gain(row: Published, method: str, published: Iterable[Published]) -> float | None:
    """Over the baseline of the same backbone; None for the baseline itself, and where there is none."""
    if row.average is None or row.method == method or not row.backbone:
        return None
    same = [p.average for p in published if (p.group, p.method, p.backbone) == ("baseline", method, row.backbone)]
    return relative_gain(row.average, same[0]) if same and same[0] is not None else None


def _published(row: Published, published: list[Published]) -> Row:
    return Row(
        group=row.group,
        name=f"{row.method} {row.backbone}".strip(),
        ours=False,
        scores=row.scores,
        average=row.average,
        gain_sft=_gain(row, SFT, published),
        gain_kd=_gain(row, KD, published),
        note=row.note,
        source=row.source,
    )


def _teacher(comparison: Comparison, index: ModelIndex, teacher: TeacherChoice, measured: Mapping[str, Speed]) -> Row:
    if teacher.name not in index.teachers:
        raise DataError(f"artifacts/models/index.json has no teacher {teacher.name!r}; `dvc repro` makes both anew")
    result, speed = comparison.teacher, measured.get(TEACHER_ARM)
    return _ours("teacher", TEACHER_ARM, result.exact_match, result.ci95, index.teachers[teacher.name].parameters, speed)


def _students(comparison: Comparison, index: ModelIndex, study: Mapping[str, Arm], measured: Mapping[str, Speed]) -> list[Row]:
    rows = []
    for name in comparison.order:
        result = comparison.arms[name]
        row = _ours(
            "student", name, result.exact_match, result.ci95, index.students[study[name].student].parameters, measured.get(name)
        )
        note = f"measured otherwise than the teacher: {'; '.join(result.differs)}" if result.differs else ""
        gains = {f"gain_{base}": _own_gain(comparison, name, base) for base in ("sft", "kd")}
        rows.append(row.model_copy(update={**gains, "note": note}))
    return rows


def _own_gain(comparison: Comparison, arm: str, base: str) -> float | None:
    """The arm's exact match relative to that of the arm `base`; None without it, or if the two were measured otherwise."""
    if base not in comparison.arms or arm == base or not comparison.arms[base].exact_match:
        return None
    if any(pair.differs for pair in comparison.pairs if {pair.arm, pair.against} == {arm, base}):
        return None
    return relative_gain(100 * comparison.arms[arm].exact_match, 100 * comparison.arms[base].exact_match)


def _ours(group: str, name: str, score: float, ci95: tuple[float, float], parameters: int, speed: Speed | None) -> Row:
    return Row(
        group=group,
        name=name,
        ours=True,
        own=100 * score,
        own_ci95=(100 * ci95[0], 100 * ci95[1]),
        scores=dict.fromkeys(PAPER),
        parameters=parameters,
        source="measured here",
        **(speed.model_dump(include={"tokens_per_second", "first_token_ms", "memory_mib"}) if speed else {}),
    )


def _on_the_six(figures: Mapping[str, float]) -> dict[str, object]:
    """Scores in the paper's units, of the kit's own files alone, and their average once there are six."""
    scores: dict[str, float | None] = {}
    for name in PAPER:
        end, unit = FIGURES[name]
        of_it = [v for key, v in figures.items() if key.startswith(f"{BENCHMARKS[name].kit_dataset}/") and key.endswith(end)]
        scores[name] = of_it[0] * unit if len(of_it) == 1 else None
    six = [value for value in scores.values() if value is not None]
    return {"scores": scores, "average": fmean(six) if len(six) == len(PAPER) else None}


def _noise(published: Iterable[Published], confidence: float) -> dict[str, float | None]:
    """Per benchmark, at the median of its published scores; None for scores that are no share of independent questions."""
    noise: dict[str, float | None] = {}
    for name in PAPER:
        scores = sorted(row.scores[name] or 0.0 for row in published if row.scores[name] is not None)
        items = BENCHMARKS[name].independent
        noise[name] = 100 * noise_unpaired(scores[len(scores) // 2] / 100, items, confidence) if items else None
    return noise


def _notes(comparison: Comparison, speed: SpeedReport | None) -> list[str]:
    measured = (
        f"Speed: {speed.questions} questions to each model in one run on {next(iter(speed.models.values())).device}."
        if speed is not None and speed.models
        else "Speed and memory were not measured: `alignti leaderboard --measure` does."
    )
    return [
        "Our models answer our own test questions, the published ones the paper's benchmarks: the two do not compare.",
        "Relative gain as the paper computes it: from averages with one decimal, percent of the same backbone's baseline.",
        f"Noise: a gap between published scores below it may be chance ({comparison.confidence:.0%}), questions taken for"
        " independent and unpaired, as nobody published the answers one by one. For POPE it is that of accuracy; MME sums"
        " pairs and MMBench asks each question in every order, so theirs is not known.",
        "Which of our gains are larger than the noise, and that of our sample: compare.md.",
        measured,
    ]


def cells(row: Row) -> list[str]:
    """A row as the tables show it."""
    low, high = row.own_ci95 or (0.0, 0.0)
    return [
        row.name,
        f"{row.own:.1f} [{low:.1f}, {high:.1f}]" if row.own is not None else DASH,
        *(_decimal(row.scores[name]) for name in PAPER),
        _decimal(row.average if row.average is None else _rounded(row.average)),
        _signed(row.gain_sft),
        _signed(row.gain_kd),
        f"{row.parameters:,}" if row.parameters is not None else DASH,
        f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else DASH,
        _decimal(row.first_token_ms),
        f"{row.memory_mib:,.0f}" if row.memory_mib is not None else DASH,
    ]


def header(board: Leaderboard) -> list[str]:
    titles = [f"{BENCHMARKS[name].title}{_within(board.noise[name])}" for name in PAPER]
    return [
        "model", "ours: exact match, %", *titles, "average", "over SFT, %", "over KD, %", "parameters", "tokens/s",
        "first token, ms", "memory, MiB",
    ]  # fmt: skip


def markdown(board: Leaderboard) -> str:
    """Our rows in bold."""
    rows = [[f"**{name}**" if row.ours else name, *rest] for row in board.rows for name, *rest in [cells(row)]]
    ours = f"Rows in bold are ours, on {board.own_questions}. The others are published."
    sources = sorted({f"{row.source}" for row in board.rows if not row.ours})
    remarks = [f"- {row.name}: {row.note}" for row in board.rows if row.note]
    parts = [
        "# Leaderboard",
        ours,
        table(header(board), rows),
        *board.notes,
        "Sources: " + "; ".join(sources) + ".",
        "\n".join(remarks),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def spreadsheet(board: Leaderboard) -> str:
    """Every row as CSV, unrounded; an empty cell is what was not measured."""
    file = io.StringIO()
    names = [name for name in Row.model_fields if name not in ("scores", "own_ci95")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, "own_low", "own_high", *PAPER])
    for row in board.rows:
        writer.writerow(
            [*(getattr(row, name) for name in names), *(row.own_ci95 or (None, None)), *(row.scores[name] for name in PAPER)]
        )
    return file.getvalue()


def page(board: Leaderboard) -> str:
    """The table as one HTML file that fetches nothing; published rows in a colour of their own."""
    return (
        templates()
        .get_template("leaderboard.html.j2")
        .render(board=board, header=header(board), rows=[(row, cells(row)) for row in board.rows], columns=len(header(board)))
    )


def write(board: Leaderboard) -> list[Path]:
    """reports/leaderboard.{md,csv,html,json}"""
    made = {"md": markdown, "csv": spreadsheet, "html": page, "json": lambda b: b.model_dump_json(indent=2) + "\n"}
    paths = []
    for kind in FORMATS:
        path = REPORTS / f"leaderboard.{kind}"
        write_text(path, made[kind](board))
        paths.append(path)
    return paths


def read_speed() -> SpeedReport | None:
    """What `--measure` left, if it ever ran here."""
    return SpeedReport.read(SPEED) if SPEED.exists() else None


def _number(text: str) -> float | None:
    return float(text) if text else None


def _decimal(value: float | None) -> str:
    return f"{value:.1f}" if value is not None else DASH


def _signed(value: float | None) -> str:
    return signed(value) if value is not None else DASH


def _within(noise: float | None) -> str:
    return f" (±{noise:.1f})" if noise is not None else ""
