"""`alignti evaluate`: each arm through each kit, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from components.config.load import load_settings
from components.errors import AlignTIError, InputError
from components.evaluate.kits import measure, table
from components.io import sha256
from components.records.paths import TEACHER_ARM


def evaluate(kits: Sequence[str], arms: Sequence[str], tasks: Sequence[str], blank: bool = False) -> None:
    """Each arm through each kit, into the table.

    Raises InputError for an unknown kit or arm, or what cannot go together, before anything is run; else as
    components/evaluate/kits/measure.py.
    """
    settings = load_settings()
    kits = kits or table.KITS
    table.check(kits)
    known = [*settings.study.arms, TEACHER_ARM]
    strange = [arm for arm in arms if arm not in known and not arm.startswith(measure.BEFORE)]
    if strange:
        raise InputError(f"--arm {strange[0]}: there are {', '.join(known)} and {measure.BEFORE}STUDENT")
    if blank and (not tasks or set(kits) != {"vlmeval"}):
        raise InputError("--blank goes with --kit vlmeval and --task; `alignti controls` asks our own questions without images")
    bench = measure.Bench(settings)
    asked = [(arm, kit) for arm in arms or [TEACHER_ARM, *settings.study.arms] for kit in kits]
    asked = [(arm, kit) for arm, kit in asked if kit != "own" or not arm.startswith(measure.BEFORE)]  # a stage asks the trained
    with tqdm(asked, desc="models x kits", unit="run", disable=None if len(asked) > 1 else True) as bar:
        for arm, kit in bar:
            path, said = _run(bench, kit, arm, tasks, blank)
            bar.write(f"{kit} {arm}: {said} -> {path}")


def _run(bench: measure.Bench, kit: str, arm: str, tasks: Sequence[str], blank: bool) -> tuple[Path, str]:
    """Path of the table and what is new in it. It is written after each run: a later one may break off."""
    if tasks:
        figures = measure.stock(bench, kit, arm, tasks, blank)
        # Read only now: another command may have written in the meantime.
        found = table.with_tasks(table.read(current), kit, arm, sha256([measure.folder_of(arm)]), figures)
        return table.write(found), ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    known = next((s for s in table.read(current).scores if (s.arm, s.kit) == (arm, kit)), None)
    fresh = known is None or not measure.is_current(bench, known)
    scores = measure.measure(bench, kit, arm) if known is None or fresh else known
    said = f"{scores.exact_match:.2%} of {scores.samples:,} right" + ("" if fresh else ", measured before")
    return table.write(table.with_scores(table.read(current), scores)), said


def current(arm: str) -> str | None:
    """Hash of the arm's model as it is now; None if there is none."""
    try:
        return sha256([measure.folder_of(arm)])
    except (AlignTIError, OSError):
        return None
