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
    """Measure each arm with each kit and update the table; none given: all of them. The command line validates their names.

    Raises InputError for incompatible options, before anything runs; later errors as in components/evaluate/kits/measure.py.
    """
    settings = load_settings()
    kits = kits or table.KITS
    if blank and (not tasks or set(kits) != {"vlmeval"}):
        raise InputError("--blank goes with --kit vlmeval and --task; `alignti controls` asks our own questions without images")
    bench = measure.Bench(settings)
    runs = [(arm, kit) for arm in arms or [TEACHER_ARM, *settings.study.arms] for kit in kits]
    # No stage scores initial checkpoints.
    runs = [(arm, kit) for arm, kit in runs if kit != "own" or not arm.startswith(measure.INITIAL_PREFIX)]
    with tqdm(runs, desc="models x kits", unit="run", disable=None if len(runs) > 1 else True) as bar:
        for arm, kit in bar:
            path, summary = _run(bench, kit, arm, tasks, blank)
            bar.write(f"{kit} {arm}: {summary} -> {path}")


def _run(bench: measure.Bench, kit: str, arm: str, tasks: Sequence[str], blank: bool) -> tuple[Path, str]:
    """Measure one arm; returns the table's path and a summary. The table is written after each run, as a later one may fail."""
    if tasks:
        figures = measure.stock(bench, kit, arm, tasks, blank)
        # Read after the run: another command may have written meanwhile.
        updated = table.with_tasks(table.read(current), kit, arm, sha256([measure.folder_of(arm)]), figures)
        return table.write(updated), ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    cached = [s for s in table.read(current).scores if (s.arm, s.kit) == (arm, kit) and measure.is_current(bench, s)]
    scores = cached[0] if cached else measure.measure(bench, kit, arm)
    summary = f"{scores.exact_match:.2%} of {scores.samples:,} right" + (", measured before" if cached else "")
    return table.write(table.with_scores(table.read(current), scores)), summary


def current(arm: str) -> str | None:
    """Hash of the arm's current model; None if there is none."""
    try:
        return sha256([measure.folder_of(arm)])
    except (AlignTIError, OSError):
        return None
