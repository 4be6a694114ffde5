"""`alignti init`: what is chosen follows from data and models, and nothing that a user wrote is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from components.cli import app
from components.config import recipes
from components.config.load import load_settings
from components.errors import DataError, InputError, ModelError
from components.own_data.init import init
from components.own_data.options import InitOptions
from tests.families import toy
from tests.own_data.conftest import ROOT, respell


def options_with(**changed: object) -> InitOptions:
    given = {
        "data": Path("data/mine/rows.json"),
        "images": Path("data/mine/images"),
        "teacher": "hub/large",
        "student": "hub/small",
    }
    return InitOptions(**{**given, **changed})  # type: ignore[arg-type]


def chosen(**changed: object) -> dict[str, object]:
    return {choice.key: choice.value for choice in init(options_with(**changed))[1]}


OPTIONS = {"data": "data/mine/rows.json", "images": "data/mine/images", "teacher": "hub/large", "student": "hub/small"}
WORDS = ["init", *(word for option, value in OPTIONS.items() for word in (f"--{option}", value))]


def test_params_are_those_of_the_data_and_the_models(project: Path) -> None:
    done = CliRunner().invoke(app, WORDS)
    assert done.exit_code == 0, done.output
    settings = load_settings()
    assert settings.models.template.style == "processor"
    assert list(settings.study.arms) == ["sft", "kd", "align_ti"]
    assert settings.data.llava is not None
    assert str(settings.data.llava.annotations) == "data/mine/rows.json"
    assert settings.irs.instructions_per_image == 2
    assert settings.distill.iva.weighting == "irs"
    assert settings.evaluate.max_new_tokens < 20
    tried = CliRunner().invoke(app, ["check", "--data"])
    assert tried.exit_code == 0, tried.output
    longest = int(tried.output.split("longest sample ")[1].split()[0])
    assert longest <= settings.models.max_length < longest + 32
    assert "first answers are longer" not in tried.output
    train = int(tried.output.split("train ")[1].split(" images, ")[1].split()[0])
    assert (
        (settings.distill.steps - 1) * settings.distill.batch_size
        < train
        <= settings.distill.steps * settings.distill.batch_size
    )
    for key in ("models.max_length", "distill.steps", "irs.instructions_per_image"):
        assert f"\n{key}: " in done.output
        assert f"# {key}: " in Path("params/recipes/own.yaml").read_text()


def test_a_teacher_no_larger_than_its_student_is_said_to_be(project: Path) -> None:
    assert not [line for line in init(options_with())[0] if "swapped" in line]
    shutil.copytree("hub/large", "hub/twin", symlinks=True)
    (warning,) = [line for line in init(options_with(student="hub/twin", name="twins"))[0] if "swapped" in line]
    assert warning.startswith("warning: the teacher")


def test_a_job_that_nobody_timed_is_said_to_be(project: Path) -> None:
    chosen()
    output = CliRunner().invoke(app, ["use", "own"]).output
    assert "How long it takes was never measured: `make repro`" in output


def test_what_a_user_wrote_stays(project: Path) -> None:
    study = Path("params/study.yaml")
    study.write_text(study.read_text() + "  mine:\n    weights: {sft: 0.7}\n    student: student\n    seed: 5\n")
    original = study.read_text()
    done = CliRunner().invoke(app, WORDS)
    assert done.exit_code == 0, done.output
    (backup,) = Path(".runs/params").iterdir()
    assert (backup / "study.yaml").read_text() == original
    assert str(backup) in done.output
    recipe = Path("params/recipes/own.yaml").read_text()
    again = CliRunner().invoke(app, WORDS)
    assert isinstance(again.exception, InputError)
    assert "is there already" in str(again.exception)
    assert Path("params/recipes/own.yaml").read_text() == recipe


def test_without_two_questions_an_image_there_is_no_irs(project: Path) -> None:
    respell(project / "data/mine", lambda rows: rows.__delitem__(slice(1, None, 2)))
    settings = chosen()
    assert settings["distill.iva.weighting"] == "uniform"
    recipes.use("own")
    assert not load_settings().needs_layer


def test_a_batch_is_shared_out_evenly_over_the_gpus(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 6)
    settings = chosen()
    assert (settings["distill.batch_size"], settings["runtime.devices"], settings["distill.precision"]) == (4, 4, "bf16")


def test_rows_that_dvc_does_not_see_are_told(project: Path) -> None:
    (project / "data/mine").rename(project / "mine")
    words = [word.replace("data/mine", "mine") for word in WORDS]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "mine/rows.json is not under data/" in done.output


def test_boxes_are_used(project: Path) -> None:
    def box(rows: list[dict[str, object]]) -> None:
        for row in rows:
            question, answer = (turn["content"] for turn in row.pop("messages"))  # type: ignore[attr-defined]
            turns = [{"from": "human", "value": question, "boxes": [[0, 0, 0.5, 0.5]]}, {"from": "gpt", "value": answer}]
            row["conversations"] = turns

    respell(project / "data/mine", box)
    settings = chosen()
    assert (settings["irs.rule"], settings["distill.iva.weighting"]) == ("pointing", "searched")
    recipes.use("own")
    load_settings()


def test_the_paper_s_template_stands_in_where_there_is_none(project: Path) -> None:
    for name, seed, layers in (("large", 1, 3), ("small", 2, 2)):
        shutil.rmtree(project / "hub" / name)
        shutil.copytree(toy.folder("llava", seed, layers), project / "hub" / name)
    assert chosen()["models.template.style"] == "vicuna"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": Path("gone.json")}, "--data gone.json: no such file"),
        ({"images": Path("gone")}, "--images gone: no such folder"),
        ({"teacher": "hub/larg"}, "--teacher hub/larg: no such folder; a model of the hub is ORG/NAME@COMMIT"),
        ({"student": "org/name@main"}, "--student org/name@main: no such folder"),
        ({"teacher": ""}, "--teacher : no such folder"),
        ({"data": Path("data/mine")}, "--data data/mine: a folder, not a file"),
        ({"name": "../x"}, "--name ../x"),
        ({"data": Path("rows.parquet")}, "docs/data.md says how"),
    ],
)
def test_arguments_are_checked_first(project: Path, changed: dict[str, object], message: str) -> None:
    Path("rows.parquet").touch()
    with pytest.raises(InputError) as raised:
        options_with(**changed).check()
    assert message in str(raised.value)
    assert not Path("params/recipes/own.yaml").exists()


def test_a_folder_without_a_model_is_refused_before_rows_and_models_are_read(project: Path) -> None:
    with pytest.raises(ModelError, match=r"hub: no config\.json; it is not a Hugging Face checkpoint folder"):
        options_with(student="hub").check()


BAD_ROWS = {
    "holds no row": lambda rows: rows.clear(),
    "40 of 40 rows are bad (40 missing_key, such as row 1": lambda rows: [row.pop("messages") for row in rows],
    "40 of 40 rows are bad (40 missing_file, such as row 1": lambda rows: [row.update(image="gone.png") for row in rows],
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_rows_are_read_before_the_models_code_is_imported(
    project: Path, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for heavy in ("torch", "transformers"):
        Path(f"{heavy}.py").write_text("raise RuntimeError('imported')")
    respell(project / "data/mine", BAD_ROWS[message])
    environment = {**os.environ, "PYTHONPATH": f"{project}{os.pathsep}{ROOT}"}
    assert subprocess.run([sys.executable, "-m", "components.cli", *WORDS], env=environment).returncode == 2
    assert message in capfd.readouterr().err


def test_a_pair_that_cannot_be_aligned_is_refused(project: Path) -> None:
    shutil.copytree(toy.folder("qwen2_vl"), project / "hub/other")
    with pytest.raises(ModelError, match=r"hub/large and student hub/other"):
        init(options_with(student="hub/other"))


def test_a_checkpoint_that_obtain_models_converts_says_so(project: Path) -> None:
    shutil.copytree(project / "hub/small", project / "hub/tiny")
    config = json.loads((project / "hub/tiny/config.json").read_text())
    (project / "hub/tiny/config.json").write_text(json.dumps(config | {"model_type": "tinyllava"}))
    with pytest.raises(ModelError, match="hub/tiny is a TinyLLaVA checkpoint, of which `obtain_models` makes a stock folder"):
        init(options_with(student="hub/tiny"))


def test_too_few_images_and_bad_rows_leave_no_recipe(project: Path) -> None:
    rows = json.loads((project / "data/mine/rows.json").read_text())
    (project / "data/mine/rows.json").write_text(json.dumps(rows[:2]))
    with pytest.raises(DataError, match="1 image, and none usable for val and test: give more"):
        init(options_with())
    (project / "data/mine/rows.json").write_text(json.dumps(rows[:16]))
    with pytest.raises(DataError, match="test has one image, and intervals need two"):
        init(options_with())
    (project / "data/mine/rows.json").write_text(json.dumps(rows[:2]))
    respell(project / "data/mine", lambda rows: rows[0].update(image="gone.png"))
    with pytest.raises(DataError, match="1 of 2 rows are bad"):
        init(options_with())
    assert not Path("params/recipes/own.yaml").exists()


def test_the_recipe_is_one_of_the_recipes(project: Path) -> None:
    init(options_with(name="mine"))
    assert "mine" in recipes.names()
    assert recipes.about("mine").run == "alignti use mine && dvc repro"
    assert yaml.safe_load(Path("params/recipes/mine.yaml").read_text())["like"] == "_full-size"
