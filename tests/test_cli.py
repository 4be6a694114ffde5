from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
import yaml

from components.cli import GROUPS, app
from components.config import recipes
from components.records.evaluate import Scores

ROOT = Path(__file__).parents[1]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "params", tmp_path / "params")
    return tmp_path


def alignti(root: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "components.cli", *args]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_use_shows_what_it_changed(root: Path) -> None:
    result = alignti(root, "use", "smoke")
    assert result.returncode == 0
    assert re.search(r"^-checkpoint_every: \d+$", result.stdout, re.MULTILINE)
    assert "\n+checkpoint_every: 4\n" in result.stdout
    assert "params/ now say what recipe smoke says" in result.stdout


def test_an_unknown_recipe_names_the_nearest_and_all(root: Path) -> None:
    result = alignti(root, "use", "digit")
    assert result.returncode == 2
    available = ", ".join(recipes.names(ROOT))
    assert result.stderr == (
        f"SettingsError: there is no recipe 'digit'; did you mean 'digits'? params/recipes/ has {available}\n"
    )


def test_check_passes_the_shipped_params_and_recipes() -> None:
    result = alignti(ROOT, "check", "--all-recipes")
    lines = ["params/: fine", *(f"recipe {name}: fine" for name in recipes.names(ROOT))]
    assert (result.returncode, result.stdout.splitlines()) == (0, lines)


def test_check_lists_every_problem_and_exits_with_2(root: Path) -> None:
    for file, old, new in (("distill", "steps:", "stepps:"), ("irs", "seed: 1", "seed: one")):
        path = root / f"params/{file}.yaml"
        path.write_text(path.read_text().replace(old, new, 1))
    result = alignti(root, "check")
    assert result.returncode == 2
    for problem in ("stepps: unknown key; did you mean 'steps'?", "steps: required", "params/irs.yaml:2: seed"):
        assert problem in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["use", "smok"], "there is no recipe 'smok'; did you mean 'smoke'?"),
        (["study", "run", "trems"], "there is no study 'trems'; did you mean 'terms'?"),
        (["study", "run", "terms", "--recipe", "smok"], "there is no recipe 'smok'; did you mean 'smoke'?"),
        (["study", "expand", "trems"], "there is no study 'trems'; did you mean 'terms'?"),
        (["compare", "trems"], "there is no study 'trems'; did you mean 'terms'?"),
        (["try", "algin_ti", "a", "--image", "params/data.yaml"], "there is no model 'algin_ti'; did you mean 'align_ti'?"),
        (["try", "teacher", "a", "--image", "params/data.yaml", "--vs", "sfd"], "there is no model 'sfd'; did you mean 'sft'?"),
        (["init", "--data", "no.json", "--images", ".", "--teacher", "a", "--student", "b"], "--data no.json: no such file"),
        (["try", "teacher", "a", "--image", "nofile.png"], "--image nofile.png: no such file"),
        (["export", "algin_ti", "out"], "there is no model 'algin_ti'; did you mean 'align_ti'?"),
        (["push", "algin_ti", "org/mine"], "there is no model 'algin_ti'; did you mean 'align_ti'?"),
        (["push", "model", "mine"], "'mine': name the repository ORG/NAME"),
        (["push", "model", "org/--mine"], "'org/--mine' is no name of a repository"),
        (["register", "algin_ti"], "there is no arm 'algin_ti'; did you mean 'align_ti'?"),
        (["promote", "algin_ti"], "there is no arm 'algin_ti'; did you mean 'align_ti'?"),
        (["controls", "--arm", "algin_ti"], "there is no arm 'algin_ti'; did you mean 'align_ti'?"),
        (["evaluate", "--arm", "algin_ti"], "there is no arm 'algin_ti'; did you mean 'align_ti'?"),
        (["evaluate", "--kit", "vlm"], "there is no kit 'vlm'; did you mean 'vlmeval'?"),
        (["replay", "nowhere"], "there is no dump of a step 'nowhere'; there are none"),
        (["reproduce", "nosuch"], "there is no run 'nosuch' in .runs/journal; `alignti runs` lists them"),
        (["benchmarks", "gqaa"], "there is no benchmark 'gqaa'; did you mean 'gqa'?"),
        (["try", "sft", "a", "--image", "params/data.yaml"], "artifacts/students/sft/model is missing; `dvc repro` makes it"),
        (["export", "teacher", "out"], "artifacts/teacher/choice.json is missing; `dvc repro` makes it"),
        (["serve", "sft"], "artifacts/students/sft/model is missing; `dvc repro` makes it"),
        (["serve", ""], "there is no model ''; there are teacher, "),
        (["try", "./none", "a", "--image", "params/data.yaml"], "./none: no such folder; a model of the hub is ORG/NAME"),
        (["try", "~/none", "a", "--image", "params/data.yaml"], "~/none: no such folder"),
        (["try", "a", "a", "--image", "params"], "--image params: a folder, not a file"),
        (["serve", "out/students/none"], "out/students/none: no such folder"),
        (["export", "params/studies", "out"], "params/studies: no config.json; it is not a Hugging Face checkpoint folder"),
        (["export", "model", "out", "--dtype", "fp8"], "--dtype fp8: choose from fp32, fp16, bf16"),
        (
            ["export", "model", "out", "--max-shard-size", "big"],
            "--max-shard-size big: a number with KB, MB, GB or TB",
        ),
        (["export", "model", "params"], "params is there already; choose another folder, or --force to replace it"),
        (["try", "model", "a", "--image", "params/data.yaml"], "--image: params/data.yaml is none of JPEG, PNG"),
        (["try", "model", " ", "--image", "params/data.yaml"], "the question is empty"),
        (["try", "model", "<image> a <image>", "--image", "params/data.yaml"], "the question shows 2 <image>"),
        (["samples"], "reports/compare.json is missing; `dvc repro` makes it"),
        (["leaderboard"], "reports/compare.json is missing; `dvc repro` makes it"),
        (["controls"], "artifacts/teacher/choice.json is missing; `dvc repro` makes it"),
        (["preview"], "no model is here whose tokenizer could read the samples; `dvc repro obtain_models` brings them"),
        (["compare", "terms"], "no run is recorded here yet: `make repro`"),
        (["promote"], "no run is recorded here yet: `make repro`"),
        (["promote", "7"], "no run is recorded here yet: `make repro`"),
    ],
)
def test_a_name_is_checked_before_anything_heavy_is_imported(root: Path, args: list[str], message: str) -> None:
    for heavy in ("torch", "transformers", "mlflow", "prefect", "dvc"):
        (root / f"{heavy}.py").write_text("raise RuntimeError('imported')")
    (root / "model").mkdir()
    (root / "model/config.json").touch()
    uri = "sqlite:///.mlflow/mlflow.db"
    result = alignti(root, *args, PYTHONPATH=f"{root}{os.pathsep}{ROOT}", ALIGNTI_TRACKING_URI=uri)
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_arms_runs_and_version_are_listed(root: Path) -> None:
    journal = root / ".runs/journal/20260101T000000-distill@kd-0a.jsonl"
    journal.parent.mkdir(parents=True)
    earlier = journal.with_name("arm-kd-00.jsonl")
    start = {"event": "start", "time": 2, "tags": {"recipe": "smoke", "mlflow.source.git.commit": "0123456789abcdef"}}
    journal.write_text(f'{json.dumps(start)}\n{{"event": "end", "status": "FINISHED"}}\n')
    scores = Scores(arm="kd", samples=4, exact_match=0.25, token_f1=0.5, per_kind={}, token_f1_per_kind={}, yes_no={})
    scores.write(root / "artifacts/scores/kd/scores.json")
    listed = alignti(root, "arms").stdout.splitlines()
    assert [line.split()[:3] for line in listed[:2]] == [["sft", "-", "student"], ["kd", "25.0%", "student"]]
    assert listed[1].endswith("sft 1 kd 1")
    study = root / "params/study.yaml"
    text = study.read_text(encoding="utf-8")
    study.write_text(text.replace("  kd:\n", "  kd:\n    steps: 7\n"), encoding="utf-8")
    assert alignti(root, "arms").stdout.splitlines()[1].endswith("sft 1 kd 1 steps=7")
    study.write_text(text, encoding="utf-8")
    stages = {"distill@kd": {"outs": [{"path": "s/kd"}], "params": {"params/distill.yaml": {"steps": 10**6}}}}
    stages |= {"evaluate@kd": {"deps": [{"path": "s/kd/model"}], "params": {}}}
    (root / "dvc.lock").write_text(json.dumps({"stages": stages}))
    _, stale_row, *_, footnote = alignti(root, "arms").stdout.splitlines()
    assert stale_row.split()[1] == "25.0%*" and footnote.startswith("* of a run with other params")
    earlier.write_text(json.dumps(start | {"time": 1}))  # the later file is of the earlier run
    with earlier.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        runs = [line.split() for line in alignti(root, "runs").stdout.splitlines()]
    assert runs == [[earlier.stem, "open", "smoke", "0123456789"], [journal.stem, "FINISHED", "smoke", "0123456789"]]
    assert alignti(root, "runs").stdout.split()[:2] == [earlier.stem, "KILLED"]
    header, line = alignti(root, "runs", "--last", "1").stdout.splitlines()
    assert header == "the last 1 of 2 runs; --last 2 shows all" and line.split()[0] == journal.stem
    assert re.fullmatch(r"alignti \S+\n", alignti(root, "--version").stdout)
    assert alignti(root, "plan", "-h").returncode == 0


def test_every_command_stands_in_one_group_of_the_help() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    output = alignti(ROOT, "-h").stdout
    assert [title for title in GROUPS if f"\n{title}:\n" in output] == list(GROUPS)


def test_check_names_data_that_are_not_here(root: Path) -> None:
    path = root / "params/data.yaml"
    llava = "llava: {annotations: data/x.json, images: data/img, val: 0.1, test: 0.1}"
    text = re.sub(r"(?m)^llava:.*(\n  .*)*", llava, path.read_text())
    path.write_text(text.replace("source: digits", "source: llava", 1))
    result = alignti(root, "check")
    assert result.returncode == 2
    assert "not here: data.llava.annotations: data/x.json, data.llava.images: data/img" in result.stderr


def test_check_refuses_a_data_folder_without_the_handwriting(root: Path) -> None:
    (root / "data/mine").mkdir(parents=True)
    result = alignti(root, "check")
    assert result.returncode == 2
    assert "data/digits.csv is missing; `git checkout data.dvc && make data` brings it" in result.stderr


def test_check_refuses_relations_of_soft_capped_logits(root: Path) -> None:
    folder = root / "gemma"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text(json.dumps({"text_config": {"final_logit_softcapping": 30.0}}))
    models, study = (yaml.safe_load((root / f"params/{file}.yaml").read_text()) for file in ("models", "study"))
    entry = {"source": "gemma", "revision": None}
    models |= {"family": "pretrained", "pretrained": {"teachers": {"teacher": entry}, "students": {"student": entry}}}
    (root / "params/models.yaml").write_text(yaml.safe_dump(models))
    assert alignti(root, "check").returncode == 0
    study["arms"]["kd"]["weights"]["relation"] = 0.5
    (root / "params/study.yaml").write_text(yaml.safe_dump(study))
    result = alignti(root, "check")
    assert result.returncode == 2
    assert "arms kd: relation takes a linear head" in result.stderr and "teacher, student" in result.stderr


def test_check_names_a_tracker_that_is_not_installed(root: Path) -> None:
    (root / "wandb.py").write_text("")
    installed = alignti(root, "check", ALIGNTI_TRACKERS="wandb", PYTHONPATH=f"{root}{os.pathsep}{ROOT}")
    assert installed.returncode == 0, installed.stderr
    if find_spec("tensorboard") is None:
        absent = alignti(root, "check", ALIGNTI_TRACKERS="tensorboard")
        assert absent.returncode == 2 and "trackers: not installed: pip install tensorboard, or leave it out" in absent.stderr


def test_use_says_where_own_values_are_kept(root: Path) -> None:
    path = root / "params/distill.yaml"
    path.write_text(path.read_text().replace("\nlog_every: ", "\nlog_every: 1"))
    result = alignti(root, "use", "smoke")
    backup = re.search(r"they are kept: `cp (\S+)/\*.yaml params/`", result.stdout)
    assert result.returncode == 0 and backup and (root / backup[1] / "distill.yaml").is_file()


def test_a_study_that_is_expanded_already_is_left_alone(root: Path) -> None:
    assert "they are kept" not in alignti(root, "study", "expand", "smoke").stdout  # params/ were a recipe's
    path = root / "params/evaluate.yaml"
    path.write_text(path.read_text().replace("\nmax_new_tokens: ", "\nmax_new_tokens: 1"))
    again = alignti(root, "study", "expand", "smoke")
    assert (again.returncode, again.stdout) == (0, "params/ say already what study smoke says.\n")


@pytest.mark.parametrize("args", [("check",), ("study", "list")])
def test_ctrl_c_ends_a_command_with_the_promised_code(root: Path, args: tuple[str, ...]) -> None:
    ctrl_c = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nsignal.raise_signal(signal.SIGINT)\n"
    (root / "pydantic.py").write_text(ctrl_c)  # in the midst of any command's work
    result = alignti(root, *args, PYTHONPATH=f"{root}{os.pathsep}{ROOT}")
    assert (result.returncode, result.stderr) == (143, "Interrupted: run the same command to go on\n")


def test_sync_without_an_address_says_where_to_put_one(root: Path) -> None:
    result = alignti(root, "sync")  # tests run with ALIGNTI_TRACKING_URI=journal
    assert result.returncode == 2
    assert "ALIGNTI_TRACKING_URI" in result.stderr


HEAVY = {"torch", "transformers", "pydantic", "numpy", "dvc", "prefect", "mlflow", "ruamel", "yaml", "rich", "pyarrow"}


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, components.cli; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_benchmarks_say_how_to_get_each_and_what_is_open(root: Path) -> None:
    result = alignti(root, "benchmarks", "textvqa")
    assert result.returncode == 0, result.stderr
    assert "textvqa: TextVQA, val 0.5.1, 5,000 questions (paper)" in result.stdout
    assert "curl -fL -o $LMUData/TextVQA_VAL.tsv https://" in result.stdout
    assert "two scores less than 2.0 points apart may differ by chance" in result.stdout  # 1.96 sqrt(2 x 0.25 / 5000)
    assert "Reference OCR token: {ocr}" in result.stdout and "  open     " in result.stdout
    wrong = alignti(root, "benchmarks", "vqa2")
    assert wrong.returncode == 2 and "there is no benchmark 'vqa2'; there are gqa, sqa" in wrong.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("serve", "nowhere"), "InputError: there is no model 'nowhere'"),
        (("serve", "sft", "--port", "99999"), "less than or equal to 65535"),
        (("evaluate", "--kit", "lmms"), "InputError: there is no kit 'lmms'; there are own, vlmeval, lm-eval\n"),
    ],
)
def test_what_cannot_be_served_or_evaluated_is_named(root: Path, args: tuple[str, ...], message: str) -> None:
    result = alignti(root, *args)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("args", [("use", "smoke"), ("study", "run", "smoke"), ("study", "list"), ("runs",), ("check",)])
def test_outside_a_project_that_is_what_is_said(tmp_path: Path, args: tuple[str, ...]) -> None:
    result = alignti(tmp_path, *args)
    assert result.returncode == 2
    assert (
        result.stderr
        == f"SettingsError: {tmp_path} has no params/: run it in the folder of a project, a clone of this repository\n"
    )


@pytest.mark.parametrize(("name", "shown"), [("two", "params/studies/two.yaml"), ("new one", "'params/studies/new one.yaml'")])
def test_a_study_that_is_not_committed_is_refused_at_once(root: Path, name: str, shown: str) -> None:
    """It runs in a workspace of the last commit, which would not know it."""
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for args in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "params"]):
        subprocess.run([*git, *args], cwd=root, check=True)
    shutil.copy(root / "params/studies/terms.yaml", root / f"params/studies/{name}.yaml")
    said = (
        f"InputError: params/studies/{name}.yaml differs from what is committed, and a study runs what is committed:"
        f" git add {shown} && git commit\n"
    )
    for change in (["status"], ["mv", "-f", "params/studies/terms.yaml", f"params/studies/{name}.yaml"]):
        subprocess.run([*git, *change], cwd=root, check=True)
        result = alignti(root, "study", "run", name)
        assert result.returncode == 2 and result.stderr == said


def test_a_broken_study_hides_no_other(root: Path) -> None:
    broken = root / "params/studies/terms.yaml"
    broken.write_text(broken.read_text().replace("grid:", "grit:"))
    result = alignti(root, "study", "list")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["field", "questions", "smoke", "weights"]
    assert result.returncode == 2 and "params/studies/terms.yaml" in result.stderr and "grit" in result.stderr


def test_the_help_of_study_is_whole(root: Path) -> None:
    output = alignti(root, "study", "--help").stdout
    assert "..." not in output.partition("Commands:")[2] and "docs/study.md" in output


def test_no_runs_are_told(root: Path) -> None:
    assert alignti(root, "runs").stdout.startswith("no runs yet: ")
