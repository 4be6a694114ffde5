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
SHOWN = 5  # maximum disagreements and failed samples listed per model and kit; kits.json has all


def check(kits: Iterable[str]) -> None:
    """Raises InputError for an unknown kit."""
    for kit in kits:
        if kit not in KITS:
            raise unknown("kit", kit, KITS)


class Asked(Record):
    """Figures of stock tasks and files, for one model and one kit."""

    model: str  # sha256 over its folder
    figures: dict[str, float]  # `task/figure` -> value


class Table(Record):
    """reports/kits.json"""

    scores: list[KitScores]  # teacher first, then by arm, then kit
    tasks: dict[str, Asked]  # "kit/arm" -> stock tasks and files


def read(current: Callable[[str], str | None], folder: Path = REPORTS) -> Table:
    """Earlier results, without those of changed models. `current`: arm -> hash of its model."""
    try:
        before = Table.read(folder / "kits.json")
    except DataError:  # none, or one of another version; measuring again costs minutes
        return Table(scores=[], tasks={})
    return Table(
        scores=[found for found in before.scores if current(found.arm) == found.model],
        tasks={who: asked for who, asked in before.tasks.items() if current(who.partition("/")[2]) == asked.model},
    )


def with_scores(table: Table, new: KitScores) -> Table:
    """Table with `new` in place of earlier scores of the same kit and arm."""
    kept = [found for found in table.scores if (found.arm, found.kit) != (new.arm, new.kit)]
    order = sorted([*kept, new], key=lambda found: (found.arm != TEACHER_ARM, found.arm, KITS.index(found.kit)))
    return table.model_copy(update={"scores": order})


def with_tasks(table: Table, kit: str, arm: str, model: str, figures: dict[str, float]) -> Table:
    """Table with `figures` merged over earlier ones of the same kit and arm."""
    who = f"{kit}/{arm}"
    before = table.tasks.get(who, Asked(model=model, figures={}))
    asked = Asked(model=model, figures=before.figures | figures)
    return table.model_copy(update={"tasks": table.tasks | {who: asked}})


def write(table: Table, folder: Path = REPORTS) -> Path:
    table.write(folder / "kits.json")
    write_text(folder / "kits.md", markdown(table))
    return folder / "kits.md"


def markdown(table: Table) -> str:
    of_arms: dict[str, list[KitScores]] = {}
    for scores in table.scores:
        of_arms.setdefault(scores.arm, []).append(scores)
    parts = ["# The same models, measured in three ways\n", _overview(of_arms), *map(_of_arm, of_arms.values())]
    return "\n".join(part for part in [*parts, _language(table.scores), _tasks(table)] if part)


def _overview(of_arms: Mapping[str, Sequence[KitScores]]) -> str:
    rows = []
    for arm, found in of_arms.items():
        right = {scores.kit: f"{scores.exact_match:.2%}" for scores in found}
        rows.append(
            [
                arm,
                *(right.get(kit, "") for kit in KITS),
                sum(len(scores.other_answers) for scores in found),
                sum(len(scores.disagreements) for scores in found),
                sum(len(scores.empty) + len(scores.overlong) + len(scores.failed) for scores in found),
                "; ".join(_unlike(found)) or "yes, but for kit and judge",
            ]
        )
    header = ["model", *KITS, "answers unlike own's", "verdicts unlike ours", "no answer", "measured alike"]
    return (
        "Share right. `own` is the stage `evaluate`; `vlmeval` asks a served student over HTTP;"
        " `lm-eval` runs the model in its own loop.\n\n"
        f"{md.table(header, rows)}\n"
    )


def _unlike(kits: Sequence[KitScores]) -> list[str]:
    """Differences between the kits' fingerprints, kit and judge aside."""
    said = []
    for scores in kits[1:]:
        told = differences(scores.fingerprint, kits[0].fingerprint)
        said += [f"{scores.kit}: {what}" for what in told if not what.startswith(("kit:", "kit version:", "judge:"))]
    return said


def _of_arm(found: Sequence[KitScores]) -> str:
    kinds = sorted({kind for scores in found for kind in scores.per_kind})
    rows = []
    for kind in kinds:
        judges = dict.fromkeys(f"{scores.kit}: {scores.judges[kind]}" for scores in found if kind in scores.judges)
        shown = (f"{scores.per_kind[kind]:.2%}" if kind in scores.per_kind else "" for scores in found)
        rows.append([kind, *shown, "; ".join(judges)])
    lines = [f"## {found[0].arm}\n", md.table(["kind", *(scores.kit for scores in found), "judges"], rows), ""]
    for scores in found:
        lines += _explained(scores)
    return "\n".join(lines) + "\n"


def _explained(scores: KitScores) -> list[str]:
    figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.figures.items() if name.startswith("yes_no/"))
    timed = f" in {scores.seconds:.0f} s" if scores.seconds else ""
    lines = [f"- **{scores.kit}**: {scores.samples:,} questions{timed}" + (f"; {figures}" if figures else "")]
    for what, ids in (
        ("were not put to it", scores.not_asked),
        ("got an empty answer", scores.empty),
        ("got an overlong answer", scores.overlong),
        ("were refused by the server", list(scores.failed)),
        ("have another answer than in `own`", scores.other_answers),
    ):
        if ids:
            lines.append(f"  - {len(ids):,} {what}: {', '.join(ids[:SHOWN])}{' ...' if len(ids) > SHOWN else ''}")
    for verdict in scores.disagreements[:SHOWN]:
        said = f"the kit says {'right' if verdict.kit else 'wrong'} of {verdict.answer[:80]!r}"
        lines.append(f"  - {verdict.id} ({verdict.kind}): {said}, reference {verdict.reference!r}")
    if len(scores.disagreements) > SHOWN:
        lines.append(f"  - ... {len(scores.disagreements):,} such verdicts in all (kits.json)")
    return lines


def _language(found: Sequence[KitScores]) -> str:
    measured = [scores for scores in found if any(name.startswith(TEXT) for name in scores.figures)]
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
    rows = [(who, name, f"{value:.4g}") for who, asked in table.tasks.items() for name, value in asked.figures.items()]
    return f"## Tasks by name\n\n{md.table(['kit/model', 'task/figure', 'value'], rows, text_columns=2)}\n"
