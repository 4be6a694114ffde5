"""Options of `alignti init` and the rows they name, checked before anything heavy is imported."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from components.config.data import DataSettings, LlavaFolder
from components.config.models import Checkpoint
from components.config.names import check_checkpoint, check_file
from components.dataset.prepare import bad_rows, source_of
from components.dataset.source import Stored
from components.errors import DataError, InputError


@dataclass(frozen=True)
class InitOptions:
    """Command-line options of `alignti init`."""

    data: Path
    images: Path
    teacher: str
    student: str
    name: str = "own"

    def check(self) -> None:
        """Raises InputError for an invalid option, or a recipe of that name."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", self.name):
            raise InputError(f"--name {self.name}: a recipe's name is of a-z, 0-9, _, . and -")
        if self.recipe.exists():
            raise InputError(f"{self.recipe} is there already: give another --name, or remove it to have it made anew")
        check_file("--data", self.data)
        if self.data.suffix not in (".json", ".jsonl"):
            raise InputError(
                f"--data {self.data}: .json and .jsonl are looked at; docs/data.md says how to name tar and Parquet"
            )
        if not self.images.is_dir():
            raise InputError(f"--images {self.images}: no such folder")
        self.checkpoint("teacher"), self.checkpoint("student")

    def check_rows(self, shipped: DataSettings) -> None:
        """Read all rows, and the images up to the first usable one. Raises DataError if the file cannot be read, more rows are
        bad than allowed, or none is usable."""
        max_bad_ratio = shipped.limits.max_bad_ratio
        with tempfile.TemporaryDirectory(prefix="alignti-") as scratch:
            source = source_of(self.settings(shipped, share=0.05), Path(scratch) / "index.sqlite")
            refused = list(source.refused())
            for outcome in chain.from_iterable(map(source.rows, range(source.parts))):
                if len(refused) > max_bad_ratio * source.rows_in:
                    break
                if isinstance(outcome, Stored):
                    return
                refused += outcome
        problem = f"{self.data}: {bad_rows(refused, source.rows_in)}"
        raise DataError(f"{problem}, more than limits.max_bad_ratio = {max_bad_ratio} of params/data.yaml allows")

    def settings(self, shipped: DataSettings, share: float) -> DataSettings:
        """Data settings with these rows and images; `share`: of val and of test."""
        llava = LlavaFolder(annotations=self.data, images=self.images, val=share, test=share)
        return shipped.model_copy(update={"source": "llava", "llava": llava})

    @property
    def recipe(self) -> Path:
        return Path(f"params/recipes/{self.name}.yaml")

    def checkpoint(self, role: str) -> Checkpoint:
        """A local folder, or ORG/NAME@COMMIT of the hub. Raises InputError."""
        value = getattr(self, role)
        if value and (folder := Path(value).expanduser()).is_dir():
            check_checkpoint(folder)
            return Checkpoint(source=value, revision=None)
        source, _, revision = value.partition("@")
        if source.count("/") == 1 and re.fullmatch(r"[0-9a-f]{40}", revision):
            return Checkpoint(source=source, revision=revision)
        raise InputError(
            f"--{role} {value}: no such folder; a model of the hub is ORG/NAME@COMMIT, with the commit's 40 digits"
        )
