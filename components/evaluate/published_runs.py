"""Published runs of the shipped recipes, several seeds each: the reference for a run of one's own."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from components.config import recipes
from components.config.yaml_file import read_yaml
from components.errors import InputError
from components.records.compare import PublishedRuns

FILE = Path(__file__).with_suffix(".yaml")


def nearest(file: Path = FILE) -> PublishedRuns | None:
    """Published runs of the recipe nearest to `params/`; None if there are none. Raises InputError if the file is malformed."""
    recipe, differing = recipes.nearest()
    entry = read_yaml(file).get(recipe) if recipe else None
    try:
        return None if entry is None else PublishedRuns.model_validate({**entry, "recipe": recipe, "differing": differing})
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f"{file}: {recipe}.{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
