"""Table of reports/kits.{json,md}: scores of all kits side by side, with the reasons for their differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from components.errors import DataError, unknown
from components.evaluate.fingerprint import differences
from components.evaluate.kits.lm_eval import TEXT
from components.evaluate.kits.scores import KitScores
from components.io import write_text
from components.records.paths import REPORTS, TEACHER_ARM
from components.records.record import Record
from components.report import markdown as md

KITS = ("own", "vlmeval", "lm-eval")
MAX_LISTED = 5  # maximum disagreements and failed samples listed per model and kit; kits.json has all


def check(kits: Iterable[str]) -> None:
    """Raises InputError for an unknown kit."""
    for kit in kits:
        if kit not in KITS:
            raise unknown("kit", kit, KITS)


class TaskScores(Record):
    """Figures of stock tasks and files, for one model and one kit."""

    model: str  # sha256 over its folder
    figures: dict[str, float]  # `task/figure` -> value


class Table(Record):
    """reports/kits.json"""

    scores: list[KitScores]  # teacher first, then by arm, then kit
    tasks: dict[str, TaskScores]  # "kit/arm" -> stock tasks and files


def read(current: Callable[[str], str | None], folder: Path = REPORTS) -> Table:
    """Earlier results, without those of changed models. `current`: arm -> hash of its model."""
    try:
        previous = Table.read(folder / "kits.json")
    except DataError:  # none, or one of another version; measuring again costs minutes
        return Table(scores=[], tasks={})
    return Table(
        scores=[scores for scores in previous.scores if current(scores.arm) == scores.model],
        tasks={
            key: task_scores
            for key, task_scores in previous.tasks.items()
            if current(key.partition("/")[2]) == task_scores.model
        },
    )


def with_scores(table: Table, new: KitScores) -> Table:
    """Table with `new` in place of earlier scores of the same kit and arm."""
    others = [scores for scores in table.scores if (scores.arm, scores.kit) != (new.arm, new.kit)]
    order = sorted([*others, new], key=lambda scores: (scores.arm != TEACHER_ARM, scores.arm, KITS.index(scores.kit)))
    return table.model_copy(update={"scores": order})


def with_tasks(table: Table, kit: str, arm: str, model: str, figures: dict[str, float]) -> Table:
    """Table with `figures` merged over earlier ones of the same kit and arm."""
    key = f"{kit}/{arm}"
    previous = table.tasks.get(key, TaskScores(model=model, figures={}))
    merged = TaskScores(model=model, figures=previous.figures | figures)
    return table.model_copy(update={"tasks": table.tasks | {key: merged}})


def write(table: Table, folder: Path = REPORTS) -> Path:
    table.write(folder / "kits.json")
    write_text(folder / "kits.md", markdown(table))
    return folder / "kits.md"


def markdown(table: Table) -> str:
    by_arm: dict[str, list[KitScores]] = {}
    for scores in table.scores:
        by_arm.setdefault(scores.arm, []).append(scores)
    parts = ["# The same models, measured in three ways\n", _overview(by_arm), *map(_arm_section, by_arm.values())]
    return "\n".join(part for part in [*parts, _language(table.scores), _tasks(table)] if part)


def _overview(by_arm: Mapping[str, Sequence[KitScores]]) -> str:
    rows = []
    for arm, kit_scores in by_arm.items():
        accuracy = {scores.kit: f"{scores.exact_match:.2%}" for scores in kit_scores}
        rows.append(
            [
                arm,
                *(accuracy.get(kit, "") for kit in KITS),
                sum(len(scores.other_answers) for scores in kit_scores),
                sum(len(scores.disagreements) for scores in kit_scores),
                sum(len(scores.empty) + len(scores.overlong) + len(scores.failed) for scores in kit_scores),
                "; ".join(_fingerprint_differences(kit_scores)) or "yes, but for kit and judge",
            ]
        )
    header = ["model", *KITS, "answers unlike own's", "verdicts unlike ours", "no answer", "measured alike"]
    return (
        "Share right. `own` is the stage `evaluate`; `vlmeval` asks a served student over HTTP;"
        " `lm-eval` runs the model in its own loop.\n\n"
        f"{md.table(header, rows)}\n"
    )


def _fingerprint_differences(kits: Sequence[KitScores]) -> list[str]:
    """Differences between the kits' fingerprints, kit and judge aside."""
    return [
        f"{scores.kit}: {difference}"
        for scores in kits[1:]
        for difference in differences(scores.fingerprint, kits[0].fingerprint)
        if not difference.startswith(("kit:", "kit version:", "judge:"))
    ]


def _arm_section(kit_scores: Sequence[KitScores]) -> str:
    kinds = sorted({kind for scores in kit_scores for kind in scores.per_kind})
    rows = []
    for kind in kinds:
        judges = dict.fromkeys(f"{scores.kit}: {scores.judges[kind]}" for scores in kit_scores if kind in scores.judges)
        shares = (f"{scores.per_kind[kind]:.2%}" if kind in scores.per_kind else "" for scores in kit_scores)
        rows.append([kind, *shares, "; ".join(judges)])
    lines = [f"## {kit_scores[0].arm}\n", md.table(["kind", *(scores.kit for scores in kit_scores), "judges"], rows), ""]
    for scores in kit_scores:
        lines += _score_lines(scores)
    return "\n".join(lines) + "\n"


def _score_lines(scores: KitScores) -> list[str]:
    figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.figures.items() if name.startswith("yes_no/"))
    duration = f" in {scores.seconds:.0f} s" if scores.seconds else ""
    lines = [f"- **{scores.kit}**: {scores.samples:,} questions{duration}" + (f"; {figures}" if figures else "")]
    for condition, ids in (
        ("were not put to it", scores.not_asked),
        ("got an empty answer", scores.empty),
        ("got an overlong answer", scores.overlong),
        ("were refused by the server", list(scores.failed)),
        ("have another answer than in `own`", scores.other_answers),
    ):
        if ids:
            lines.append(
                f"  - {len(ids):,} {condition}: {', '.join(ids[:MAX_LISTED])}{' ...' if len(ids) > MAX_LISTED else ''}"
            )
    for verdict in scores.disagreements[:MAX_LISTED]:
        judgement = f"the kit says {'right' if verdict.kit else 'wrong'} of {verdict.answer[:80]!r}"
        lines.append(f"  - {verdict.id} ({verdict.kind}): {judgement}, reference {verdict.reference!r}")
    if len(scores.disagreements) > MAX_LISTED:
        lines.append(f"  - ... {len(scores.disagreements):,} such verdicts in all (kits.json)")
    return lines


def _language(kit_scores: Sequence[KitScores]) -> str:
    measured = [scores for scores in kit_scores if any(name.startswith(TEXT) for name in scores.figures)]
    if not measured:
        return ""
    names = [name for name in measured[0].figures if name.startswith(TEXT)]
    rows = [[scores.arm, *(f"{scores.figures[name]:.4g}" for name in names)] for scores in measured]
    return (
        "## Language without an image (lm-eval)\n\n"
        "`alignti_language`: perplexity per word of questions and answers as plain text, lower is better. `alignti_manners`:"
        " how often the right kind of answer is the likeliest of four; guessing gives 25%.\n\n"
        f"{md.table(['model', *names], rows)}\n"
    )


def _tasks(table: Table) -> str:
    if not table.tasks:
        return ""
    rows = [
        (key, name, f"{value:.4g}") for key, task_scores in table.tasks.items() for name, value in task_scores.figures.items()
    ]
    return f"## Tasks by name\n\n{md.table(['kit/model', 'task/figure', 'value'], rows, text_columns=2)}\n"
