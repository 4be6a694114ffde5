"""Checks of names on the command line, before heavy imports."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from components.errors import DataError, InputError, ModelError, unknown
from components.records.paths import DUMPS, STUDENTS, TEACHER, TEACHER_ARM

HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*?)(?:@(?P<revision>[\w.-]+))?")  # ORG/NAME[@REVISION]
CONFIGS = ("config.json", "adapter_config.json")  # of a model, of LoRA adapters


def check_file(option: str, path: Path) -> None:
    """Raises InputError if there is no file."""
    if not path.is_file():
        raise InputError(f"{option} {path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")


def check_dump(folder: Path) -> None:
    """Raises InputError if the folder holds no dumped step."""
    if not (folder / "dump.json").is_file():
        raise unknown("dump of a step", str(folder), sorted(str(path) for path in DUMPS.glob("*-step-*")))


def check_checkpoint(folder: Path) -> None:
    """Raises ModelError for a folder without a model."""
    if not any((folder / config).is_file() for config in CONFIGS):
        raise ModelError(f"{folder}: no config.json; it is not a Hugging Face checkpoint folder")


def check_models(*names: str) -> None:
    """Raises InputError for a name that is neither an arm, `teacher`, a folder nor ORG/NAME of the hub; ModelError for a folder
    without a model; DataError for an arm or teacher that is not there yet."""
    available = model_names()
    for name in sorted(names, key=available.__contains__):  # unknown names before those that need a `dvc repro`
        if name in available:
            artifact = TEACHER / "choice.json" if name == TEACHER_ARM else STUDENTS / name / "model"
            if not artifact.exists():
                raise DataError(f"{artifact} is missing; `dvc repro` makes it")
        elif name and Path(name).is_dir():
            check_checkpoint(Path(name))
        elif "/" not in name:
            raise unknown("model", name, available)
        elif not HUB_ID.fullmatch(name):
            raise InputError(f"{name}: no such folder; a model of the hub is ORG/NAME or ORG/NAME@REVISION")


def check_arms(names: Iterable[str], teacher: bool = True) -> None:
    """Raises InputError for a name that is neither an arm nor, where allowed, `teacher`."""
    allowed = model_names()[0 if teacher else 1 :]
    for name in names:
        if name not in allowed:
            raise unknown("arm", name, allowed)


def model_names() -> list[str]:
    """`teacher` and the arms of params/study.yaml."""
    from components.config.load import load_settings

    return [TEACHER_ARM, *load_settings().study.arms]
