"""What of a study is committed: it runs in a workspace of the last commit."""

from __future__ import annotations

from pathlib import Path

from components.errors import InputError
from components.study.expand import STUDIES
from components.tracking import provenance


def check_committed(study: str, recipe: str | None) -> list[str]:
    """Other files of params/ with uncommitted changes. Raises InputError if the study's own file or its recipe has some."""
    status = provenance.git("status", "--porcelain", "--untracked-files=all", "--", "params") or ""
    changed = [line.split(maxsplit=1)[1] for line in status.splitlines()]
    study_files = [str(STUDIES / f"{study}.yaml"), *([f"params/recipes/{recipe.partition('/')[0]}.yaml"] if recipe else [])]
    if uncommitted := [file for file in study_files if file in changed]:
        raise InputError(
            f"{' and '.join(uncommitted)} differs from what is committed, and a study runs what is committed:"
            f" git add {' '.join(uncommitted)} && git commit"
        )
    return [file for file in changed if Path(file).parent == Path("params")]
