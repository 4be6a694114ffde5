"""Expansion of a study into arms: a base arm, cells that override it, and a grid over each cell.

    params/studies/NAME.yaml  ->  `arms:` of params/study.yaml, each a DVC stage

An arm's name is its cell and grid values (`kd-seed1`), so a changed or added value leaves the other arms' stages up to date,
and DVC runs only new ones.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from components.config import recipes
from components.config.distill import DistillSettings
from components.config.fields import ArmName, PositiveFloat, Strict
from components.config.load import check_project, load_settings
from components.config.merge import merge
from components.config.settings import Settings
from components.config.study import Arm, StudySettings
from components.config.yaml_file import read_yaml
from components.cost.estimate import step_operations
from components.errors import SettingsError, unknown
from components.records.distill import Cost
from components.records.paths import STUDENTS

ARM_BLOCKS = Arm.model_fields.keys() & DistillSettings.model_fields.keys()  # defaults from params/distill.yaml
STUDIES = Path("params/studies")
SEED = "seed"  # grid key whose values are repetitions, not variants


class Family(Strict):
    """Family of comparisons whose p values are adjusted together."""

    variants: list[ArmName]
    against: list[ArmName]


class Study(Strict):
    """`params/studies/NAME.yaml`. Keys such as `weights.tpa` are paths into an arm."""

    about: str = Field(description="what the study is to find out")
    base: dict[str, Any] = Field(description="what all arms have in common")
    cells: dict[ArmName, dict[str, Any]] = Field(description="named changes of the base; none: the base alone, unnamed")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(description="path -> values; every combination is run")
    baselines: list[ArmName] = Field(description="variants (arms without their seed) that the others are tested against")
    families: dict[str, Family] | None = Field(
        default=None, description="comparisons by the question they answer; none: every variant against the baselines"
    )
    budgets: list[Literal["operations", "seconds"]] = Field(
        default=[],
        description="cells are run once more with as many steps as take what the first baseline does: operations, counted from"
        " shapes; seconds, as the trainings at equal steps took here",
    )
    distill: dict[str, Any] = Field(default={}, description="params/distill.yaml where its arms need it otherwise")
    device_hours: PositiveFloat | None = Field(description="no further arm is started when it would pass this; null: no cap")
    diverged_above: PositiveFloat | None = Field(
        description="an arm is stopped at this multiple of its first loss; null: never"
    )

    @model_validator(mode="after")
    def _something(self) -> Study:
        if not self.cells and not self.grid:
            raise ValueError("neither cells nor grid: there is nothing to compare")
        return self


class Cell(Strict):
    """Arm of a study."""

    name: ArmName
    variant: str  # name without the seed, shared by repetitions
    arm: Arm


def names(root: Path = Path()) -> list[str]:
    return sorted(path.stem for path in (root / STUDIES).glob("*.yaml"))


def read(name: str, root: Path = Path()) -> Study:
    """Study of that name. Raises SettingsError with all problems of the file, or the known studies."""
    check_project(root)
    path = root / STUDIES / f"{name}.yaml"
    if name not in names(root):
        raise SettingsError(str(unknown("study", name, names(root))))
    try:
        return Study.model_validate(read_yaml(path))
    except ValidationError as error:
        raise SettingsError(_problems(path, error)) from None


def cells(name: str, root: Path = Path()) -> list[Cell]:
    """Arms of the study in file order, those of budgets last. Raises SettingsError with all invalid arms and names."""
    study = read(name, root)
    settings = _with_own_values(study, f"{STUDIES / name}.yaml", root)
    file, expanded, problems = STUDIES / f"{name}.yaml", [], []
    points = [dict(zip(study.grid, values, strict=True)) for values in itertools.product(*study.grid.values())]
    for (cell, changes), point in itertools.product(study.cells.items() or [("", {})], points):
        arm: dict[str, Any] = {}
        for path, value in [*study.base.items(), *changes.items(), *point.items()]:
            _set(arm, path, value, settings)
        label = "-".join([*filter(None, [cell]), *(_label(path, value) for path, value in point.items() if path != SEED)])
        seed = _label(SEED, point[SEED]) if SEED in point else ""
        try:
            arm_name = "-".join(filter(None, [label, seed]))
            expanded.append(Cell(name=arm_name, variant=label or "base", arm=Arm.model_validate(arm)))
        except ValidationError as error:
            problems.append(_problems(f"{file}: {arm_name}", error))
    if not problems:
        expanded += [
            cell for budget in study.budgets for cell in _budget_cells(budget, expanded, study.baselines, settings, root)
        ]
    repeated = sorted(arm for arm, times in Counter(cell.name for cell in expanded).items() if times > 1)
    problems += [f"{file}: two arms would be called {arm}" for arm in repeated]
    variants = list(dict.fromkeys(cell.variant for cell in expanded))
    compared = {"baselines": study.baselines}
    for question, family in (study.families or {}).items():
        compared |= {f"families.{question}": [*family.variants, *family.against]}
    problems += [
        f"{file}: {key}: {variant!r} is none of the variants {', '.join(variants)}"
        for key, names in compared.items()
        for variant in names
        if variant not in variants and not problems
    ]
    if problems:
        raise SettingsError("\n".join(problems))
    return expanded


def _with_own_values(study: Study, file: str, root: Path) -> Settings:
    """Settings of params/ with the study's `distill`, which its arms' blocks start from, and its budgets."""
    settings, values = load_settings(root), read_yaml(root / "params/distill.yaml")
    merge(study.distill, values, DistillSettings)
    try:
        return settings.model_copy(update={"distill": DistillSettings.model_validate(values)})
    except ValidationError as error:
        raise SettingsError(_problems(f"{file}: distill", error)) from None


def _budget_cells(budget: str, cells: list[Cell], baselines: list[str], settings: Settings, root: Path) -> list[Cell]:
    """Cells but the first baseline's, with steps scaled to the cost of the baseline of the same seed."""
    baseline_cells = {cell.arm.seed: cell for cell in cells if baselines and cell.variant == baselines[0]}
    if not baseline_cells:
        raise SettingsError(f"budgets: {budget}: they are what the first of `baselines` takes, and there is none")
    costs = _costs(budget, cells, settings, root)
    scaled = []
    for cell in cells:
        if cell.variant != baselines[0]:
            baseline = baseline_cells.get(cell.arm.seed) or next(iter(baseline_cells.values()))
            share = costs[baseline.name] / costs[cell.name]
            steps = max(1, round((baseline.arm.steps or settings.distill.steps) * share))
            variant, arm = f"{cell.variant}-{budget}", cell.arm.model_copy(update={"steps": steps})
            scaled.append(Cell(name=variant + cell.name.removeprefix(cell.variant), variant=variant, arm=arm))
    return scaled


def _costs(budget: str, cells: list[Cell], settings: Settings, root: Path) -> dict[str, float]:
    """Cell -> operations or median seconds of one step."""
    if budget == "seconds":
        costs = {cell.name: root / STUDENTS / cell.name / "cost.json" for cell in cells}
        if untrained := [name for name, cost in costs.items() if not cost.is_file()]:
            raise SettingsError(
                f"budgets: seconds: {untrained[0]} was not trained here yet; expand the study without this budget,"
                " `make repro`, then give it again"
            )
        return {name: Cost.read(cost).seconds_per_step for name, cost in costs.items()}
    recipe, _ = recipes.nearest(root)
    assert recipe is not None  # there are recipes
    study = settings.model_copy(update={"study": StudySettings(arms={cell.name: cell.arm for cell in cells})})
    return {cell.name: step_operations(recipe, study.arm(cell.name), study, root) for cell in cells}


def families(study: Study, arms: Sequence[Cell]) -> dict[str, Family]:
    """Families of the study: as declared, else every variant against the baselines."""
    variants = list(dict.fromkeys(cell.variant for cell in arms))
    return study.families or {"Against the baselines": Family(variants=variants, against=study.baselines)}


def expand(name: str, root: Path = Path()) -> str:
    """Merge the study into `params/` and return the diff. Nothing is written unless the result is valid."""
    return recipes.write(merged(name, root), root)


def merged(name: str, root: Path = Path()) -> dict[Path, str]:
    """New text of every params file that the study would change: its arms in study.yaml, its baselines in evaluate.yaml, its
    `distill` in distill.yaml. Raises SettingsError for all problems of the study or of the merged settings."""
    study, arms = read(name, root), cells(name, root)
    first_cell = {cell.variant: cell.name for cell in reversed(arms)}  # variant -> its first cell
    updates = {
        "study": {"arms": {cell.name: _arm_values(cell.arm) for cell in arms}},
        "evaluate": {"baselines": [first_cell[variant] for variant in dict.fromkeys(study.baselines)]},
        "distill": study.distill,
    }
    return recipes.checked_texts(updates, f"study {name}", root)


def _arm_values(arm: Arm) -> dict[str, Any]:
    """Arm as in params/study.yaml, without unset blocks, which default to params/distill.yaml."""
    return {key: value for key, value in arm.model_dump(mode="json").items() if value is not None}


def _set(arm: dict[str, Any], path: str, value: Any, settings: Settings) -> None:
    """Set a path such as `weights.tpa`; an unset block starts from its values in params/distill.yaml."""
    block, _, key = path.partition(".")
    if not key:
        arm[block] = dict(value) if isinstance(value, dict) else value
        return
    if arm.get(block) is None:
        shared = settings.distill.model_dump(mode="json")
        arm[block] = shared[block] if block in ARM_BLOCKS | settings.distill.blocks.keys() else {}
    target = arm.setdefault(block, {})
    if not isinstance(target, dict) or "." in key:
        raise SettingsError(f"{path}: no such place in an arm; paths are like `weights.tpa`, `tpa.draws`, `seed`")
    target[key] = value


def _label(path: str, value: Any) -> str:
    """Name part of a grid value, in the characters of arm names: `weights.tpa`, 0.5 -> `tpa0_5`."""
    text = "none" if value is None else str(value).lower() if not isinstance(value, float) else f"{value:g}"
    key = path.rpartition(".")[2] if not isinstance(value, str) else ""
    return re.sub(r"[^a-z0-9_]+", "_", f"{key}{text}")


def _problems(location: Path | str, error: ValidationError) -> str:
    lines = (
        f"{location}: {'.'.join(map(str, p['loc'])) or '(file)'}: {p['msg'].removeprefix('Value error, ')}"
        for p in error.errors()
    )
    return "\n".join(lines)
