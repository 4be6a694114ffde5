"""Named overlays of `params/`: `params/recipes/NAME.yaml` holds, per params file, the values that it sets.

Mappings are merged key by key, except those keyed by user-chosen names (arms, teachers, students), which are replaced: an arm
left over would be trained too. Lists are replaced.

Beside params files a recipe may have `like: OTHER` (its defaults), `mixture: NAME` (of params/mixtures/, as data.mixture) and
`phases:`, the runs before it, each an overlay of it named NAME/PHASE.

    alignti use NAME                             merges the recipe into params/
    python -m components.config.recipes NAME     merges params/ into the recipe, after the shipped values have changed
"""

from __future__ import annotations

import copy
import difflib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from components.config.fields import PositiveFloat, PositiveInt, Strict
from components.config.load import check_project, load_settings
from components.config.merge import annotation, merge, round_trip, text_of, updates
from components.config.settings import FILES, Settings
from components.config.yaml_file import read_yaml
from components.errors import SettingsError, meant
from components.io import write_text
from components.process import exit_from
from components.records.paths import RUNS

Loader = Callable[[str], Any]


class SampleSize(Strict):
    """Text tokens of a mean sample, for the cost model."""

    text: PositiveInt = Field(description="before the answer")
    response: PositiveInt


class About(Strict):
    """Header of every recipe."""

    run: str = Field(description="the command")
    hardware: str
    time: str | None = Field(description="of the whole job on that hardware; null: never measured")
    memory: str | None = Field(None, description="of one device; of small recipes, `hardware` says it")
    result: str = Field(description="what to expect, or what is published, and where")
    seconds: dict[str, PositiveFloat] | None = Field(description="per stage, one cell of it; null: the cost model foresees it")
    device: str | None = Field(None, description="of components/cost/step.py, that the cost model reckons with")
    sample: SampleSize | None = None


def names(root: Path = Path()) -> list[str]:
    """All recipes, each followed by its phases as NAME/PHASE in the order in which they are run."""
    return [name for stem in _file_stems(root) for name in (stem, *(f"{stem}/{phase}" for phase in phases(stem, root)))]


def phases(name: str, root: Path = Path()) -> list[str]:
    """Phases of recipe `name`, the runs before it, in order."""
    return list(_with_parents(name.partition("/")[0], root).get("phases") or {})


def about(name: str, root: Path = Path()) -> About:
    """Header of recipe `name`. Raises SettingsError if a field is missing or wrong."""
    try:
        return About.model_validate(_document(name, root).get("about"))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, ("about", *problem["loc"])))
        raise SettingsError(f"{_path(name, root)}: {key}: {problem['msg']}") from None


def settings_with(name: str, root: Path = Path()) -> Settings:
    """Settings of `params/` with recipe `name` merged in; nothing is written. Raises SettingsError."""
    raw = {file: read_yaml(root / "params" / f"{file}.yaml") for file in FILES}
    _apply_overlay(overlay(name, root), raw)
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(f"recipe {name} does not fit these params: {error.errors()[0]['msg']}") from None


def merged(name: str, root: Path = Path()) -> dict[Path, str]:
    """New text of every params file that recipe `name` would change, comments kept; nothing is written.

    Raises SettingsError if there is no such recipe, or for all problems of the merged settings.
    """
    check_project(root)
    about(name, root)
    return checked_texts(overlay(name, root, round_trip().load), f"recipe {name}", root)


def checked_texts(values: Mapping[str, Any], description: str, root: Path = Path()) -> dict[Path, str]:
    """New text of every params file that `values` (file -> values) changes. Raises SettingsError if the outcome is not
    valid."""
    yaml = round_trip()
    texts = {}
    with tempfile.TemporaryDirectory() as draft:
        (Path(draft) / "params").mkdir()
        for file in FILES:
            path = root / "params" / f"{file}.yaml"
            read_yaml(path)  # raises with file and line
            text = path.read_text(encoding="utf-8")
            document = yaml.load(text)
            if merge(values.get(file, {}), document, annotation(file)):
                texts[path] = text = text_of(document)
            (Path(draft) / "params" / f"{file}.yaml").write_text(text, encoding="utf-8")
        try:
            load_settings(Path(draft))
        except SettingsError as error:
            raise SettingsError(f"{description} does not fit these params; {error}") from None
    return texts


def use(name: str, root: Path = Path()) -> str:
    """Merge recipe `name` into `params/` and return a unified diff. If the result is invalid, nothing is written."""
    return write(merged(name, root), root)


def write(texts: Mapping[Path, str], root: Path = Path()) -> str:
    """Write the new texts of params files and return a unified diff."""
    diff = ""
    for path, text in texts.items():
        old_text, name = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        diff += "".join(difflib.unified_diff(old_text.splitlines(True), text.splitlines(True), f"a/{name}", f"b/{name}", n=1))
        write_text(path, text)
    return diff


def back_up_own_values(root: Path = Path()) -> str:
    """Back up `params/` if it holds values of no recipe (own arms); returns a message that names the copy, or ""."""
    if not nearest(root)[1]:
        return ""
    backup = root / RUNS / "params" / time.strftime("%Y%m%dT%H%M%S")
    for file in FILES:
        write_text(backup / f"{file}.yaml", (root / "params" / f"{file}.yaml").read_text(encoding="utf-8"))
    return f"params/ held values that no recipe has; they are kept: `cp {backup}/*.yaml params/` brings them back."


def restate(name: str, root: Path = Path()) -> None:
    """Merge every value of `params/` into recipe `name`, which keeps its comments. Raises SettingsError if there is no such
    recipe, or params/ are another one unchanged, whose values it would take."""
    about(name, root)
    nearest_name, differing = nearest(root)
    if nearest_name != name and not differing:
        raise SettingsError(f"params/ say what recipe {nearest_name} says: `alignti use {name}` and change those")
    path = _path(name, root)
    yaml = round_trip()
    recipe = yaml.load(path.read_text(encoding="utf-8"))
    for file in FILES:
        params = yaml.load((root / "params" / f"{file}.yaml").read_text(encoding="utf-8"))
        merge(params, recipe.setdefault(file, yaml.map()), annotation(file))
    write_text(path, text_of(recipe))


def nearest(root: Path = Path()) -> tuple[str | None, int]:
    """Recipe nearest to `params/` and the number of differing values; of equals, the one with more values."""
    params = {file: read_yaml(root / "params" / f"{file}.yaml") for file in FILES}
    ranks: list[tuple[int, int, str]] = []
    for name, values in _overlays(root):
        differing = sum(1 for file in values for _ in updates(values[file], params[file], annotation(file)))
        ranks.append((differing, -_count_values(values), name))
    differing, _, nearest_name = min(ranks, default=(0, 0, None))
    return nearest_name, differing


def _path(name: str, root: Path) -> Path:
    return root / "params/recipes" / f"{name.partition('/')[0]}.yaml"


def overlay(name: str, root: Path = Path(), load: Loader | None = None) -> dict[str, Any]:
    """File -> values of recipe `name`."""
    document = _document(name, root, load)
    return {file: document[file] for file in FILES if file in document}


def _document(name: str, root: Path, load: Loader | None = None) -> dict[str, Any]:
    """Recipe with its `like`, phase and mixture merged in. Raises SettingsError."""
    stem, slash, phase = name.partition("/")
    if stem not in _file_stems(root) or (slash and phase not in phases(stem, root)):
        available = names(root)
        raise SettingsError(f"there is no recipe {name!r}; {meant(name, available)}params/recipes/ has {', '.join(available)}")
    return _resolve(_with_parents(stem, root, load), name, root, load)


def _resolve(document: dict[str, Any], name: str, root: Path, load: Loader | None = None) -> dict[str, Any]:
    """`document` with phase and mixture merged in, in place."""
    phase = name.partition("/")[2]
    if phase:
        _apply_overlay({"about": {"run": f"alignti use {name} && make repro"}}, document)
        _apply_overlay(document["phases"][phase], document)
    if mixture := document.get("mixture"):
        block = {"source": "mixture", "mixture": _read(root / "params/mixtures" / f"{mixture}.yaml", load)}
        _apply_overlay({"data": block}, document)
    return document


def _overlays(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every recipe and phase with its values, each file read once or twice."""
    for stem in _file_stems(root):
        recipe = _with_parents(stem, root)
        for name in (stem, *(f"{stem}/{phase}" for phase in recipe.get("phases") or {})):
            document = _resolve(copy.deepcopy(recipe), name, root)
            yield name, {file: document[file] for file in FILES if file in document}


def _file_stems(root: Path, pattern: str = "[!_]*") -> list[str]:
    return sorted(path.stem for path in (root / "params/recipes").glob(f"{pattern}.yaml"))


def _with_parents(stem: str, root: Path, load: Loader | None = None, descendants: tuple[str, ...] = ()) -> dict[str, Any]:
    """Recipe file merged over its `like`. `descendants`: the recipes that inherit from this one."""
    path = _path(stem, root)
    recipe = {key: value for key, value in _read(path, load).items() if value is not None}  # `data:` alone sets nothing
    _check_shape(recipe, str(path), ("like", "phases"))
    if "like" not in recipe:
        return recipe
    if recipe["like"] not in _file_stems(root, "*"):
        raise SettingsError(f"{path}: like: params/recipes/ has no {recipe['like']!r}")
    if recipe["like"] in (*descendants, stem):
        raise SettingsError(f"{path}: like: {' is like '.join((*descendants, stem, recipe['like']))}")
    document = _with_parents(recipe["like"], root, load, (*descendants, stem))
    _apply_overlay(recipe, document)
    return document


def _check_shape(recipe: Any, where: str, more: tuple[str, ...] = ()) -> None:
    """Raises SettingsError if a recipe or phase has keys besides files of params/, `about`, `mixture` and `more`, or a key has
    the wrong type: names for `like` and `mixture`, else mappings."""
    if not isinstance(recipe, Mapping):
        raise SettingsError(f"{where}: must hold keys with values, not {str(recipe)[:60]!r}")
    if unknown_keys := sorted(set(recipe) - {"about", "mixture", *more, *FILES}):
        raise SettingsError(f"{where}: {', '.join(unknown_keys)}: no such file in params/; known: {', '.join(FILES)}")
    for key, value in recipe.items():
        is_name = key in ("like", "mixture")
        if value is not None and not isinstance(value, str if is_name else Mapping):
            required = "be a name" if is_name else "hold keys with values"
            raise SettingsError(f"{where}: {key}: must {required}, not {str(value)[:60]!r}")
    for name, phase in (recipe.get("phases") or {}).items():
        _check_shape(phase, f"{where}: phases.{name}")


def _apply_overlay(overlay: Mapping[str, Any], document: dict[str, Any]) -> None:
    """Merge a recipe's values, and those of its phases, into a document."""
    for key, value in overlay.items():
        if key == "phases":
            for phase, values in (value or {}).items():
                _apply_overlay(values, document.setdefault("phases", {}).setdefault(phase, {}))
        elif key in FILES:
            merge(value or {}, document.setdefault(key, {}), annotation(key))
        elif key == "about":
            document[key] = {**document.get(key, {}), **(value or {})}
        else:
            document[key] = value


def _read(path: Path, load: Loader | None) -> dict[str, Any]:
    document = read_yaml(path)  # raises with file and line if malformed
    return load(path.read_text(encoding="utf-8")) if load else document


def _count_values(node: Any) -> int:
    return sum(map(_count_values, node.values())) if isinstance(node, Mapping) else 1


def main() -> None:
    if len(sys.argv) != 2:
        raise SettingsError("which recipe? python -m components.config.recipes NAME")
    restate(sys.argv[1])


if __name__ == "__main__":
    exit_from(main)
