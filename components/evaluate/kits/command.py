"""`alignti evaluate`: each arm through each kit, and the table."""

from __future__ import annotations

from collections.abc import Sequence

from components.artifacts import TEACHER_ARM, sha256
from components.errors import AlignTIError, InputError
from components.evaluate.kits import measure, table
from components.settings import load_settings


def evaluate(kits: Sequence[str], arms: Sequence[str], tasks: Sequence[str]) -> None:
    """Raises InputError for an unknown kit or arm before anything is run; else as components/evaluate/kits/measure.py."""
    settings = load_settings()
    kits = kits or table.KITS
    unknown = [kit for kit in kits if kit not in table.KITS]
    if unknown:
        raise InputError(f"--kit {unknown[0]}: there are {', '.join(table.KITS)}")
    known = [*settings.study.arms, TEACHER_ARM]
    strange = [arm for arm in arms if arm not in known and not arm.startswith(measure.BEFORE)]
    if strange:
        raise InputError(f"--arm {strange[0]}: there are {', '.join(known)} and {measure.BEFORE}STUDENT")
    bench = measure.Bench(settings)
    for arm in arms or list(settings.study.arms):
        for kit in kits:
            if tasks:
                figures = measure.stock(bench, kit, arm, tasks)
                found = table.read(_current)  # only now: another command may have written in the meantime
                before = found.tasks.get(f"{kit}/{arm}", {})
                found = found.model_copy(update={"tasks": found.tasks | {f"{kit}/{arm}": before | figures}})
                said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            elif kit == "own" and arm.startswith(measure.BEFORE):
                continue  # the stage `evaluate` asks trained students alone
            else:
                scores = measure.measure(bench, kit, arm)
                found = table.with_scores(table.read(_current), scores)
                said = f"{scores.exact_match:.2%} of {scores.samples:,} right"
            path = table.write(found)  # after each: what follows may break off
            print(f"{kit} {arm}: {said} -> {path}")


def _current(arm: str) -> str | None:
    try:
        return sha256([measure.folder_of(arm)])
    except (AlignTIError, OSError):
        return None
