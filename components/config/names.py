"""Checks of names on the command line, before heavy imports."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def check_dump(folder: Path) -> None:
    """Raises InputError if the folder holds no dumped step."""
    from components.errors import unknown
    from components.records.paths import DUMPS

    if not (folder / "dump.json").is_file():
        raise unknown("dump of a step", str(folder), sorted(str(path) for path in DUMPS.glob("*-step-*")))


def check_models(*names: str | None) -> None:
    """Raises InputError for a name that is neither an arm, `teacher`, a folder nor ORG/NAME of the hub; DataError for an arm
    or teacher that is not there yet."""
    from components.errors import DataError, unknown
    from components.records.paths import STUDENTS, TEACHER, TEACHER_ARM

    known = answering()
    for name in names:
        if name is not None and name not in known and "/" not in name and not Path(name).is_dir():
            raise unknown("model", name, known)
    for name in [name for name in names if name in known]:
        made = TEACHER / "choice.json" if name == TEACHER_ARM else STUDENTS / name / "model"
        if not made.exists():
            raise DataError(f"{made} is missing; `dvc repro` makes it")


def check_arms(names: Iterable[str], teacher: bool = True) -> None:
    """Raises InputError for a name that is neither an arm nor, where allowed, `teacher`."""
    from components.errors import unknown

    known = answering()[0 if teacher else 1 :]
    for name in names:
        if name not in known:
            raise unknown("arm", name, known)


def answering() -> list[str]:
    """`teacher` and the arms of params/study.yaml."""
    from components.config.load import load_settings
    from components.records.paths import TEACHER_ARM

    return [TEACHER_ARM, *load_settings().study.arms]
