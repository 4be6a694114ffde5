"""Plan of `make repro`: stale stages by DVC's status and its graph, with reasons and times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.config import recipes
from components.config.settings import Settings
from components.cost.estimate import estimate
from components.errors import InputError
from components.tracking import history
from flows import dvc

NEW = ["has not run yet"]


@dataclass(frozen=True)
class Step:
    stage: str
    reasons: list[str]  # reasons to run; empty: up to date
    seconds: float | None  # None: no run here, and no figure in the recipe


def plan(settings: Settings) -> tuple[list[Step], str, str | None]:
    """Steps in DVC's order, the source of their times, and the recipe nearest to `settings`."""
    recipe, differing = recipes.nearest()
    expected = _expected(recipe, settings)
    reasons = reasons_to_run(dvc.graph(), dvc.status())
    steps = [Step(stage, why, _seconds(stage, recipe, expected)) for stage, why in reasons.items()]
    same = "is" if not differing else f"in {differing} value(s) differs from"
    return steps, f"from the last runs here, else what the recipe expects (params/ {same} {recipe})", recipe


def _expected(recipe: str | None, settings: Settings) -> dict[str, float]:
    """Seconds per stage, by the recipe's own figures or else by the cost model."""
    if recipe is None:
        return {}
    if recipe_seconds := recipes.about(recipe).seconds:
        return recipe_seconds
    try:
        cost = estimate(recipe, settings)
    except InputError:  # a model of unknown shape: the stages are untimed, and the cost report names it
        return {}
    return cost.seconds if cost else {}


def reasons_to_run(graph: Mapping[str, list[str]], status: dict[str, Any]) -> dict[str, list[str]]:
    """Reasons to run per stage: of those that DVC calls changed and all downstream (DVC skips those with equal inputs)."""
    reasons: dict[str, list[str]] = {}
    for stage, needs in graph.items():
        downstream_of = [f"after {upstream}" for upstream in needs if reasons[upstream]]
        own_reasons = _reasons(status.get(stage, []))
        reasons[stage] = own_reasons if own_reasons == NEW else own_reasons + downstream_of
    return reasons


def _reasons(changes: list[Any]) -> list[str]:
    """`[{"changed deps": {"a.py": "modified"}}, "changed command"]` as ["a.py modified", "changed command"]."""
    reasons = []
    for change in changes:
        changed_paths = {change: {}} if isinstance(change, str) else change
        for kind, paths in changed_paths.items():
            if "new" in paths.values():  # params that DVC has no record of
                return NEW
            reasons += [] if paths else [kind]
            for path, state in paths.items():
                reasons += [f"{path}:{key} {s}" for key, s in state.items()] if isinstance(state, dict) else [f"{path} {state}"]
    return reasons


def _seconds(stage: str, recipe: str | None, expected: dict[str, float]) -> float | None:
    """Seconds of the last run here, if it was of this recipe; else the recipe's figure; else the last run of any recipe."""
    last = history.last(stage)
    if last and last.recipe == recipe:
        return last.seconds
    return expected.get(stage, expected.get(stage.partition("@")[0], last.seconds if last else None))
