from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.config import recipes
from components.config.load import load_settings
from components.config.settings import FILES
from components.config.yaml_file import read_yaml
from components.errors import SettingsError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "params", tmp_path / "params")
    return tmp_path


def contents(root: Path) -> dict[str, bytes]:
    return {file: (root / "params" / f"{file}.yaml").read_bytes() for file in FILES}


@pytest.mark.parametrize("name", recipes.names(ROOT))
def test_a_recipe_fits_and_says_what_it_is(name: str, root: Path) -> None:
    about = recipes.about(name, root)
    if about.seconds is None:
        assert about.device is not None and about.sample is not None  # what the cost model goes by
    else:
        stages = {stage.split("@")[0] for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]}
        assert set(about.seconds) == stages
    assert f"alignti use {name}" in about.run
    first = (ROOT / f"params/recipes/{name.partition('/')[0]}.yaml").read_text().split("\n")
    assert next(line for line in first if not line.startswith("#")) == "about:"
    recipes.use(name, root)
    load_settings(root)
    nearest, differing = recipes.nearest(root)
    assert differing == 0
    if name not in TWICE:
        assert nearest == name
    if "/" not in name:
        assert recipes.use(name, root) == ""


# A teacher's runs, which serve two students.
TWICE = [f"{name}/{phase}" for name in ("paper-qwen2.5-1.5b", "paper-qwen3-1.7b") for phase in ("teacher-align", "teacher")]


@pytest.mark.parametrize(
    "names",
    [
        ("paper-qwen2.5-0.5b/align", "paper-qwen2.5-0.5b"),
        ("paper-qwen3-0.6b/teacher", "qwen3-vl-8b-to-2b"),
        ("smoke", "qwen2.5-vl-7b-to-3b"),
    ],
)
def test_nothing_is_left_of_a_recipe_that_was_used_before(names: tuple[str, str], root: Path) -> None:
    def read() -> dict[str, Any]:
        values = load_settings(root).model_dump()
        for block, key in (("data", "digits"), ("models", "embedded")):  # not read by a pretrained family
            del values[block][key]
        del values["runtime"]
        return values

    shipped = contents(root)
    recipes.use(names[1], root)
    alone = read()
    recipes.use(names[0], root)
    recipes.use(names[1], root)
    assert read() == alone
    recipes.use("digits", root)
    assert contents(root) == shipped


def test_recipes_for_gpus_set_the_same_keys_so_that_nothing_of_one_is_left_by_another() -> None:
    def leaves(values: object, prefix: str = "") -> set[str]:
        user_named = prefix in ("models.pretrained", "study.arms", "data.mixture")
        if not isinstance(values, dict) or user_named:
            return {prefix}
        return {leaf for key, value in values.items() for leaf in leaves(value, f"{prefix}.{key}".lstrip("."))}

    large = [name for name in recipes.names(ROOT) if recipes.about(name, ROOT).seconds is None]
    keys = {name: leaves(recipes.overlay(name, ROOT)) for name in large}
    assert large and all(recipe_keys == keys[large[0]] for recipe_keys in keys.values())


def test_a_phase_lies_on_its_recipe_and_that_on_the_one_it_is_like() -> None:
    phase, parent = (recipes.overlay(name, ROOT) for name in ("paper-qwen3-1.7b/align", "paper-qwen3-1.7b"))
    assert phase["models"]["template"] == parent["models"]["template"]  # of paper-qwen2.5-0.5b
    assert "Qwen3-1.7B" in str(phase["models"]["pretrained"]["students"]) and phase["distill"]["stage"] == "align"
    assert parent["distill"]["stage"] == "distill" and parent["distill"]["tpa"]["draws"] == 4  # of _full-size
    mixture = read_yaml(ROOT / "params/mixtures/paper-stage-1.yaml")
    assert (phase["data"]["source"], phase["data"]["mixture"]) == ("mixture", mixture)
    assert recipes.phases("paper-qwen3-1.7b", ROOT) == ["teacher-align", "teacher", "align"]


@pytest.mark.parametrize("name", ["paper-qwen3-0.6/align", "paper-qwen3-0.6b/aling", "_full-size", "digits/"])
def test_an_unknown_recipe_or_phase_is_named_with_its_neighbour(name: str) -> None:
    with pytest.raises(SettingsError, match=f"there is no recipe '{name}'; .*params/recipes/ has digits"):
        recipes.merged(name, ROOT)


def test_digits_says_what_the_shipped_params_say_all_of_it(root: Path) -> None:
    assert recipes.use("digits", root) == ""
    values = read_yaml(root / "params/recipes/digits.yaml")
    for file in FILES:
        assert values[file] == read_yaml(root / "params" / f"{file}.yaml"), f"digits.yaml does not restate params/{file}.yaml"


def test_own_values_are_kept_before_a_recipe_replaces_them(root: Path) -> None:
    assert recipes.back_up_own_values(root) == ""  # the shipped params are a recipe's
    path = root / "params/study.yaml"
    text = path.read_text() + "  mine: {weights: {sft: 1.0, kd: 2.0, iva: 0.0, tpa: 0.0}, student: student, seed: 1}\n"
    path.write_text(text)
    backup = Path(recipes.back_up_own_values(root).split("`cp ")[1].split("/*.yaml")[0])
    recipes.use("smoke", root)
    assert "mine" not in path.read_text()
    assert (backup / "study.yaml").read_text() == text
    assert {file.stem for file in backup.iterdir()} == set(FILES)
    assert recipes.back_up_own_values(root) == ""  # smoke's alone


def test_smoke_and_back_gives_the_same_bytes(root: Path) -> None:
    original = contents(root)
    assert "--- a/params/data.yaml\n+++ b/params/data.yaml" in recipes.use("smoke", root)
    assert contents(root) != original
    recipes.use("digits", root)
    assert contents(root) == original


def test_comments_and_the_way_values_are_written_survive(root: Path) -> None:
    recipes.use("smoke", root)
    text = (root / "params/data.yaml").read_text()
    assert "  max_pixels: 50_000_000    # larger images are quarantined before they are decoded\n" in text
    assert "llava: null\n" in text


def test_restating_takes_over_what_params_say_now_and_keeps_comments(root: Path) -> None:
    path = root / "params/distill.yaml"
    path.write_text(re.sub(r"(?m)^steps: \d+", "steps: 7", path.read_text()))
    recipes.restate("digits", root)
    assert recipes.nearest(root) == ("digits", 0)
    shipped, restated = ((folder / "params/recipes/digits.yaml").read_text() for folder in (ROOT, root))
    assert restated == re.sub(r"(?m)^(distill:\n  rows:.*\n  steps:) \d+", r"\1 7", shipped) != shipped


def test_a_recipe_does_not_take_the_values_of_another(root: Path) -> None:
    recipes.use("smoke", root)
    before = (root / "params/recipes/digits.yaml").read_text()
    with pytest.raises(SettingsError, match="params/ say what recipe smoke says: `alignti use digits`"):
        recipes.restate("digits", root)
    assert (root / "params/recipes/digits.yaml").read_text() == before


ABOUT = "about: {run: alignti use mine, hardware: any, time: none, result: none, seconds: {}}\n"


def recipe(root: Path, body: str) -> None:
    (root / "params/recipes/mine.yaml").write_text(ABOUT + body)


def test_mappings_of_the_users_own_names_are_replaced_others_merged(root: Path) -> None:
    recipe(
        root,
        """
evaluate: {baselines: [only]}
distill: {optimiser: {learning_rate: 1.0e-4}, iva: {weighting: layer, layer: 0}}
models: {embedded: {teachers: {big: {hidden: 8, layers: 1, heads: 1, kv_heads: 1, mlp: 8}}}}
study:
  arms:
    only: {weights: {sft: 0.0, kd: 1.0, iva: 0.0, tpa: 0.0}, student: student, seed: 2}
""",
    )
    shipped = load_settings(root)
    recipes.use("mine", root)
    merged = load_settings(root)
    assert list(merged.study.arms) == ["only"]
    assert merged.models.embedded is not None
    assert list(merged.models.embedded.teachers) == ["big"]
    assert list(merged.models.embedded.students) == ["student"]
    assert merged.distill.optimiser == shipped.distill.optimiser.model_copy(update={"learning_rate": 1e-4})
    assert (merged.distill.iva.layer, merged.distill.steps) == (0, shipped.distill.steps)


def test_a_block_that_is_null_is_filled_in(root: Path) -> None:
    recipe(root, "data: {source: llava, llava: {annotations: a.json, images: i, val: 0.1, test: 0.1}}")
    recipes.use("mine", root)
    assert load_settings(root).data.source == "llava"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("distill: {stpes: 1}", r"params/distill.yaml:\d+: stpes: unknown key; did you mean 'steps'"),
        ("distill: {micro_batch_size: 48}\nevaluate: {split: train}", "2 problem"),
        ("study: {arms: {a: {weights: {sft: 1.0, kd: 0.0, iva: 0.0, tpa: 0.0}, student: s, seed: 1}}}", "none of the students"),
        ("distil: {steps: 1}", "distil: no such file in params/"),
        ("distill: {steps", "not valid YAML"),
        ("like: [smoke]", "like: must be a name"),
        ("like: mine", "like: mine is like mine"),
        (f"like: {'x' * 300}", "like: params/recipes/ has no 'xxx"),
        ("data: [digits]", "data: must hold keys with values"),
        ("phases: {align: [1]}", "phases.align: must hold keys with values"),
        ("phases: {align: {distil: {steps: 1}}}", "phases.align: distil: no such file in params/"),
        ("phases: {align: {like: smoke}}", "phases.align: like: no such file in params/"),
        ("phases: {align: {data: 1}}", "phases.align: data: must hold keys with values"),
        ("mixture: {x: 1}", "mixture: must be a name"),
    ],
)
def test_a_recipe_that_does_not_fit_changes_nothing(root: Path, body: str, message: str) -> None:
    recipe(root, body)
    previous = contents(root)
    with pytest.raises(SettingsError, match=message):
        recipes.use("mine", root)
    assert contents(root) == previous


@pytest.mark.parametrize("keys", ["like:\nmixture:\ndata:", "like: smoke\nevaluate:"])
def test_keys_that_hold_nothing_say_nothing(root: Path, keys: str) -> None:
    (root / "params/recipes/mine.yaml").write_text(f"{keys}\ndistill: {{steps: 3}}\n")
    assert recipes.overlay("mine", root)["distill"]["steps"] == 3
    (root / "params/recipes/mine.yaml").write_text(f"{ABOUT}{keys}\nphases: {{last: {{data: , distill: {{steps: 3}}}}}}\n")
    for name in ("mine", "mine/last"):
        recipes.merged(name, root)
    (root / "params/recipes/mine.yaml").write_text("about: [1]\n")
    with pytest.raises(SettingsError, match="about: must hold keys with values"):
        recipes.overlay("mine", root)


@pytest.mark.parametrize("damage", ["\nsteps: 3\n", "\nx: [\n"])
def test_params_that_no_recipe_can_be_merged_into_are_named(root: Path, damage: str) -> None:
    with (root / "params/distill.yaml").open("a") as file:
        file.write(damage)
    with pytest.raises(SettingsError, match=r"params/distill\.yaml"):
        recipes.use("smoke", root)


def test_a_recipe_says_what_it_costs_or_is_refused(root: Path) -> None:
    (root / "params/recipes/mine.yaml").write_text("distill: {steps: 1}\n")
    with pytest.raises(SettingsError, match=r"mine.yaml: about"):
        recipes.use("mine", root)


def test_the_nearest_recipe_is_known_after_a_change(root: Path) -> None:
    path = root / "params/distill.yaml"
    path.write_text(re.sub(r"(?m)^steps: \d+", "steps: 7", path.read_text()))
    assert recipes.nearest(root) == ("digits", 1)
