from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.config.load import load_settings
from components.errors import SettingsError
from components.records.distill import Cost
from components.study import expand

ROOT = Path(__file__).parents[2]
STUDY: dict[str, Any] = {
    "about": "a test",
    "base": {"weights": {"sft": 1.0, "kd": 1.0, "iva": 0.0, "tpa": 0.0}, "student": "student"},
    "cells": {"kd": {}, "ours": {"weights.iva": 1.0, "weights.tpa": 1.0}},
    "grid": {"tpa.draws": [1, 4], "seed": [1, 2]},
    "baselines": ["kd-draws1"],
    "device_hours": None,
    "diverged_above": None,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "params", tmp_path / "params")
    return tmp_path


def write(root: Path, **changes: Any) -> None:
    (root / "params/studies/mine.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))


@pytest.mark.parametrize("name", expand.names(ROOT))
def test_every_shipped_study_is_valid(name: str, root: Path) -> None:
    expand.expand(name, root)
    assert [cell.name for cell in expand.cells(name, root)] == list(load_settings(root).study.arms)


def test_the_docs_have_every_method_of_the_field_and_what_its_step_was_measured_to_cost() -> None:
    measured, named = dict[str, str](), set[str]()
    for run in ("-controls", "", "-va_kd"):  # an arm that was measured again: its later run
        result = json.loads((ROOT / f"benchmarks/results/methods-digits{run}.json").read_text())
        measured |= {name: f"{arm['of_kd']:.2f}" for name, arm in result["arms"].items()}
    for line in (ROOT / "docs/methods.md").read_text().partition("## What the tests hold")[0].splitlines():
        cells = line.split(" | ") if line.startswith("| `") else [line]
        first, *others = re.findall(r"`(\w+)`", cells[0]) or [""]
        names = [first, *(first + name if name.startswith("_") else name for name in others)]
        named |= {*names}
        if len(cells) > 3 and {*names} <= {*measured} and "`iva_*`" not in cells[0]:
            assert re.findall(r"\d\.\d\d", cells[2]) == [measured[name] for name in names], line
    assert not {cell.variant for cell in expand.cells("field", ROOT) if not cell.name.startswith("iva_")} - named


def test_each_cell_runs_through_the_grid(root: Path) -> None:
    write(root)
    cells = {cell.name: cell for cell in expand.cells("mine", root)}
    names = [f"{cell}-draws{draws}-seed{seed}" for cell in ("kd", "ours") for draws in (1, 4) for seed in (1, 2)]
    assert list(cells) == names
    arm = cells["ours-draws4-seed2"].arm
    assert (arm.weights["kd"], arm.weights["tpa"], arm.seed) == (1.0, 1.0, 2)
    assert arm.tpa is not None and arm.tpa.draws == 4
    assert arm.tpa.source == load_settings(root).distill.tpa.source  # the rest of a block is as in params/distill.yaml
    assert cells["ours-draws4-seed2"].variant == "ours-draws4"


def test_expanding_writes_arms_and_baselines_and_says_so(root: Path) -> None:
    write(root)
    diff = expand.expand("mine", root)
    assert "+  kd-draws1-seed1:" in diff
    settings = load_settings(root)
    assert settings.arm("ours-draws1-seed1").weights["iva"] == 1.0
    assert settings.evaluate.baselines == ["kd-draws1-seed1"]
    assert expand.expand("mine", root) == ""


def test_an_added_value_leaves_the_arms_that_were_there_as_they_were(root: Path) -> None:
    write(root)
    original = {cell.name: cell.arm for cell in expand.cells("mine", root)}
    write(root, grid={"tpa.draws": [1, 2, 4], "seed": [1, 2, 3]})
    extended = {cell.name: cell.arm for cell in expand.cells("mine", root)}
    assert original.items() <= extended.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"weights.tpaa": [1.0]}}, "weights.tpaa"),
        ({"grid": {"weights.tpa": [-1.0], "seed": [1]}, "baselines": []}, "weights.tpa: Input should be greater than or equal"),
        ({"cells": {}, "grid": {}}, "there is nothing to compare"),
        ({"families": {"q": {"variants": ["kd"], "against": []}}}, "families.q: 'kd' is none of the variants kd-draws1"),
        ({"baselines": ["sft"]}, "'sft' is none of the variants kd-draws1"),
        ({"grid": {"tpa.draws": [2, 2], "seed": [1]}, "baselines": []}, "two arms would be called kd-draws2-seed1"),
        ({"grid": {"a.b.c": [1]}}, "no such place in an arm"),
        ({"budget": 3}, "budget: Extra inputs"),
        ({"base": STUDY["base"] | {"student": "nobody"}}, "'nobody' is none of the students"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(root: Path, changes: dict[str, Any], message: str) -> None:
    original = (root / "params/study.yaml").read_bytes()
    write(root, **changes)
    with pytest.raises(SettingsError, match=message.replace(".", r"\.")):
        expand.expand("mine", root)
    assert (root / "params/study.yaml").read_bytes() == original


def test_an_unknown_study_is_told_with_those_there_are(root: Path) -> None:
    with pytest.raises(SettingsError, match=r"no study 'term'.*smoke, terms"):
        expand.read("term", root)


def test_a_studys_own_values_are_those_of_its_blocks_and_budgets_before_they_are_in_params(root: Path) -> None:
    cells = {"kd": {}, "ours": {"weights.tpa": 1.0, "tpa.source": "teacher"}}
    own = {"steps": 200, "tpa": {"draws": 8}}
    write(root, cells=cells, grid={"seed": [1]}, baselines=["kd"], budgets=["operations"], distill=own)
    first = expand.cells("mine", root)
    expand.expand("mine", root)
    assert expand.cells("mine", root) == first
    ours, scaled = (cell.arm for cell in first if cell.variant != "kd")
    assert ours.tpa and ours.tpa.draws == 8 and scaled.steps and scaled.steps < 200
    write(root, cells=cells, grid={"seed": [1]}, baselines=["kd"], distill={"tpa": {"draws": 0}})
    with pytest.raises(SettingsError, match=r"mine\.yaml: distill: tpa\.draws: Input should be greater than 0"):
        expand.cells("mine", root)


def test_a_budget_gives_each_cell_the_steps_that_cost_what_the_baseline_does(root: Path) -> None:
    cells = {"kd": {}, "ours": {"weights.iva": 1.0, "weights.tpa": 1.0}, "sft": {"weights.kd": 0.0}, "short": {"steps": 10}}
    same: dict[str, Any] = {"cells": cells, "grid": {"seed": [1, 2]}, "baselines": ["kd"]}
    write(root, **same)
    equal = expand.cells("mine", root)
    write(root, **same, budgets=["operations", "seconds"])
    with pytest.raises(SettingsError, match=r"kd-seed1 was not trained here yet; expand the study without this budget"):
        expand.cells("mine", root)
    for cell in equal:
        seconds = {"kd": 40.0, "ours": 80.0, "sft": 20.0, "short": 1.0}[cell.variant] * cell.arm.seed
        steps = cell.arm.steps or 400
        median = seconds / steps if cell.variant == "ours" else None  # as a run without other work would have it
        total = 9 * seconds if median else seconds
        cost = Cost(train_seconds=total, step_seconds=median, peak_memory_mib=1.0, device="cpu", steps=steps)
        cost.write(root / f"artifacts/students/{cell.name}/cost.json")
    by_name = {cell.name: cell for cell in expand.cells("mine", root)}
    assert [*by_name.values()][: len(equal)] == equal and len(by_name) == 3 * len(equal) - 4, "the baseline is not run again"
    assert [by_name[f"{name}-seconds-seed2"].arm.steps for name in ("ours", "sft", "short")] == [200, 800, 400]
    counted = {name: by_name[f"{name}-operations-seed1"].arm.steps or 0 for name in ("ours", "sft", "short")}
    assert counted["ours"] < counted["short"] == 400 < counted["sft"]
    expand.expand("mine", root)
    assert load_settings(root).arm("ours-operations-seed1").steps == counted["ours"]
    write(root, **same | {"baselines": []}, budgets=["operations"])
    with pytest.raises(SettingsError, match="the first of `baselines`"):
        expand.cells("mine", root)
