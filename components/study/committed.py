"""Check that a study is committed: it runs in a workspace of the last commit."""

from __future__ import annotations

import shlex
from pathlib import Path

from components.errors import InputError
from components.study.expand import STUDIES
from components.tracking import provenance


def check_committed(study: str, recipe: str | None) -> list[str]:
    """Other files of params/ with uncommitted changes. Raises InputError if the study's own file or its recipe has some."""
    status = provenance.git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", "params") or ""
    changed = [entry.split(maxsplit=1)[1] for entry in status.split("\0") if entry]
    study_files = [str(STUDIES / f"{study}.yaml"), *([f"params/recipes/{recipe.partition('/')[0]}.yaml"] if recipe else [])]
    if uncommitted := [file for file in study_files if file in changed]:
        raise InputError(
            f"{' and '.join(uncommitted)} differs from what is committed, and a study runs what is committed:"
            f" git add {shlex.join(uncommitted)} && git commit"
        )
    return [file for file in changed if Path(file).parent == Path("params")]
