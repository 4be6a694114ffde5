"""Resumable output folder: a draft that replaces the target when complete; an interrupted run resumes it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.io import fingerprint
from components.process import locked
from components.records.paths import RUNS
from components.records.record import Record
from components.tracking.import_graph import SHARED, closure, modules


@contextmanager
def resumable(target: Path, facts: Record, module: str, **batching: float) -> Iterator[Path]:
    """Draft of `target`, with the partial output of an interrupted run of the same facts and code of `module`. It replaces
    `target` if the block succeeds. `batching`: settings that decide bytes, though a reader takes any.

    Raises TryAgainError if another process holds the draft.
    """
    code = [modules()[name] for name in closure(module, SHARED)]
    draft = RUNS / target.name / fingerprint({**facts.model_dump(), **batching}, code)
    draft.mkdir(parents=True, exist_ok=True)
    with locked(draft.with_suffix(".lock"), f"another process is making {target}"):
        for stray in draft.rglob(".*.tmp"):  # a kill in mid-write left it
            stray.unlink()
        yield draft
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.replace(target)
