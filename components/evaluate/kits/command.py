"""`alignti evaluate`: scores of each arm by each kit, as a table."""

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
    """Measure each arm with each kit and update the table; none given: all of them. The command line knows their names.

    Raises InputError for incompatible options, before anything runs; later errors as in components/evaluate/kits/measure.py.
    """
    settings = load_settings()
    kits = kits or table.KITS
    if blank and (not tasks or set(kits) != {"vlmeval"}):
        raise InputError("--blank goes with --kit vlmeval and --task; `alignti controls` asks our own questions without images")
    bench = measure.Bench(settings)
    asked = [(arm, kit) for arm in arms or [TEACHER_ARM, *settings.study.arms] for kit in kits]
    asked = [(arm, kit) for arm, kit in asked if kit != "own" or not arm.startswith(measure.BEFORE)]  # no stage scores these
    with tqdm(asked, desc="models x kits", unit="run", disable=None if len(asked) > 1 else True) as bar:
        for arm, kit in bar:
            path, said = _run(bench, kit, arm, tasks, blank)
            bar.write(f"{kit} {arm}: {said} -> {path}")


def _run(bench: measure.Bench, kit: str, arm: str, tasks: Sequence[str], blank: bool) -> tuple[Path, str]:
    """Measure one arm; returns the table's path and a summary. The table is written after each run, as a later one may fail."""
    if tasks:
        figures = measure.stock(bench, kit, arm, tasks, blank)
        # Read after the run: another command may have written meanwhile.
        found = table.with_tasks(table.read(current), kit, arm, sha256([measure.folder_of(arm)]), figures)
        return table.write(found), ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    known = [s for s in table.read(current).scores if (s.arm, s.kit) == (arm, kit) and measure.is_current(bench, s)]
    scores = known[0] if known else measure.measure(bench, kit, arm)
    said = f"{scores.exact_match:.2%} of {scores.samples:,} right" + (", measured before" if known else "")
    return table.write(table.with_scores(table.read(current), scores)), said


def current(arm: str) -> str | None:
    """Hash of the arm's current model; None if there is none."""
    try:
        return sha256([measure.folder_of(arm)])
    except (AlignTIError, OSError):
        return None
