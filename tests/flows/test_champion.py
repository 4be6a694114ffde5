"""Register, promote, reproduce and the nightly flow, with DVC, git and MLflow as they are, and stages that take no time.

The answers of arm `A` are right as often as `skill-A` says.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.config.load import load_settings
from components.config.settings import Settings
from components.errors import DataError, InputError, TryAgainError
from components.model_registry import measure
from components.model_registry.paired_test import MeasuredDifferently
from components.records.evaluate import Prediction, Scores
from components.records.paths import SCORES
from components.tracking import mlflow_client, mlflow_registry, mlflow_sync, provenance
from components.tracking.journal import JOURNALS
from components.tracking.stage_run import JOURNAL_ONLY
from flows import dvc, dvc_repro, nightly, promote, reproduce
from tests.flows.test_notify import webhook

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
SQLITE = "sqlite:///.mlflow/mlflow.db"
ARMS = ("weak", "like", "strong")

PIPELINE = """
vars:
  - params/study.yaml:arms
stages:
  prepare:
    cmd: python stage.py prepare
    deps: [data]
    params:
      - params/data.yaml:
    outs: [artifacts/dataset]
  distill:
    foreach: ${arms}
    do:
      cmd: python stage.py distill ${key}
      deps: [artifacts/dataset, "components/skill-${key}"]
      params:
        - params/study.yaml:
            - arms.${key}
      outs: ["artifacts/students/${key}"]
  evaluate:
    foreach: ${arms}
    do:
      cmd: python stage.py evaluate ${key}
      deps: ["artifacts/students/${key}"]
      outs: ["artifacts/scores/${key}"]
  compare:
    cmd: python stage.py compare
    deps: [artifacts/scores]
    outs: [reports/compare.md]
"""

STAGE = """
import json, sys, time
from pathlib import Path
from components.tracking.stage_run import stage_run
from components.config.load import load_settings
stage, *arm = sys.argv[1:]
main = Path(".runs").resolve().parent
def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
with stage_run(stage, *arm, runtime=load_settings().runtime):
    with (main / "ran.log").open("a") as log:
        log.write("-".join([stage, *arm]) + "\\n")
    if stage == "prepare":
        count = int(Path("data/raw.txt").read_text())
        split = {"images": count, "samples": count, "kinds": {"count": count}, "shards": []}
        rows = {"rows_in": count, "rows_out": count, "quarantined": 0}
        manifest = {"source": "digits", **rows, "splits": {"train": split}, "digest": "d"}
        write("artifacts/dataset/manifest.json", json.dumps(manifest))
    if stage == "distill":
        cost = {"train_seconds": time.monotonic(), "peak_memory_mib": 10.0, "device": "cpu", "steps": 1}
        write(f"artifacts/students/{arm[0]}/cost.json", json.dumps(cost))
        salt = main / "salt"
        skill = Path(f"components/skill-{arm[0]}").read_text() + (salt.read_text() if salt.exists() else "")
        write(f"artifacts/students/{arm[0]}/model/weights", skill)
    if stage == "evaluate":
        asked = str(json.loads(Path("artifacts/dataset/manifest.json").read_text())["rows_in"])
        share = float(Path(f"artifacts/students/{arm[0]}/model/weights").read_text().split()[0])
        right = [i < share * 100 for i in range(100)]
        asks = {"kind": "count", "question": "?", "answer": "1"}
        lines = [
            {"id": str(i), "image_id": str(i), **asks, "reference": str(i % 10), "correct": correct}
            for i, correct in enumerate(right)
        ]
        write(f"artifacts/scores/{arm[0]}/predictions.jsonl", "".join(json.dumps(line) + "\\n" for line in lines))
        fingerprint = {
            "kit": "alignti", "kit_version": "1", "dataset": "digits/test", "dataset_hash": asked, "prompt_hash": "b",
            "decoding": {}, "judge": "c", "transformers": "5", "dtype": "float32", "device": "cpu",
        }
        score = sum(right) / 100
        scores = {"arm": arm[0], "samples": 100, "exact_match": score, "per_kind": {"count": score}, "yes_no": {}}
        scores |= {"token_f1": score, "token_f1_per_kind": {"count": score}}
        write(f"artifacts/scores/{arm[0]}/scores.json", json.dumps({**scores, "fingerprint": fingerprint}))
    if stage == "compare":
        write("reports/compare.md", "compared")
"""

IGNORED = (
    "artifacts",
    "reports",
    ".runs",
    ".mlflow",
    "ran.log",
    "salt",
    "/data",
    ".dvc/tmp",
    ".dvc/cache",
    ".dvc/config.local",
)


def git(*args: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *args], check=True, capture_output=True)


def commit(**files: str) -> None:
    for name, text in files.items():
        Path("components", name.replace("_", "-")).write_text(text)
    git("add", "--all")
    git("commit", "--quiet", "--allow-empty", "-m", "change")


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "ALIGNTI_EXPERIMENT": "tests"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A clone in which three arms were trained and scored."""
    root = tmp_path_factory.mktemp("clone")
    arm = {"weights": {"sft": 1.0, "kd": 0.0, "iva": 0.0, "tpa": 0.0}, "student": "student", "seed": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, value in {**ENVIRONMENT, "ALIGNTI_TRACKING_URI": JOURNAL_ONLY}.items():
            patch.setenv(name, value)
        shutil.copytree(ROOT / "params", "params")
        Path(".mlflow").mkdir()
        shutil.copy(empty_database, ".mlflow/mlflow.db")
        Path("params/study.yaml").write_text(json.dumps({"arms": dict.fromkeys(ARMS, arm)}))
        params = yaml.safe_load(Path("params/evaluate.yaml").read_text()) | {"baselines": ["weak"], "bootstrap_resamples": 200}
        Path("params/evaluate.yaml").write_text(yaml.safe_dump(params))
        files = {"dvc.yaml": PIPELINE, "stage.py": STAGE, ".gitignore": "\n".join(IGNORED), "data/raw.txt": "100"}
        for name, text in {**files, ".dvc/config": "[core]\n    analytics = false\n"}.items():
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text(text)
        Path("components").mkdir()
        git("init", "--quiet")
        add_data("100")
        commit(skill_weak="0.5", skill_like="0.52", skill_strong="0.9")
        dvc_repro.reproduce_all()
    return root


def add_data(text: str) -> None:
    Path("data/raw.txt").write_text(text)
    subprocess.run([*dvc.DVC, "add", "--quiet", "data"], check=True, env=dvc.environment(), capture_output=True)


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current directory."""
    root = tmp_path / "clone"
    shutil.copytree(template, root, symlinks=True)
    monkeypatch.chdir(root)
    for name, value in {**ENVIRONMENT, "ALIGNTI_TRACKING_URI": SQLITE}.items():
        monkeypatch.setenv(name, value)
    return root


@pytest.fixture
def trained(folder: Path) -> Settings:
    return load_settings()


def test_the_champion_changes_only_on_a_lead_beyond_chance(trained: Settings) -> None:
    with pytest.raises(InputError, match="no student of tests is registered"):
        promote.promote(None, trained)
    assert promote.register(["weak"], trained) == (["weak"], True)
    first = promote.promote(None, trained)
    assert first.promoted and first.champion is None
    assert "is the first champion: 50.0% on 100 questions, recipe " in first.why
    assert first.why.endswith("the most frequent answer to each kind gives 10.0%")
    assert promote.register(list(ARMS), trained) == (["like", "strong"], True)

    client = mlflow_client.client(SQLITE)
    like = promote.promote("like", trained)
    assert not like.promoted and "+2.00 points" in like.why and "no lead beyond chance" in like.why
    held = mlflow_registry.by_alias(client, "tests", mlflow_registry.CHAMPION)
    assert held is not None and held.arm == "weak"

    shutil.rmtree("artifacts/scores")  # the answers come from DVC's cache
    best = promote.promote(None, trained)  # the candidate is the best that was registered last
    assert best.promoted and best.candidate.arm == "strong" and best.difference is not None
    assert best.difference.difference == pytest.approx(0.4) and best.difference.ci95[0] > 0
    now = mlflow_registry.by_alias(client, "tests", mlflow_registry.CHAMPION)
    assert now is not None and now.arm == "strong" and now.tags["promotion"] == best.why
    assert mlflow_registry.by_number(client, "tests", held.number).tags["succeeded_by"] == now.number  # type: ignore[union-attr]
    assert "bytes of the champion already" in promote.promote(now.number, trained).why

    version = client.get_model_version("tests", now.number)
    trainings = client.search_runs([client.get_experiment_by_name("tests").experiment_id], "tags.stage = 'distill'")
    assert version.run_id in {run.info.run_id for run in trainings if run.data.tags["cell"] == "strong"}
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    assert logged.tags["mlflow.model.isExternal"] == "true"
    assert (
        version.tags["dvc.md5"] == logged.tags["dvc.md5"] == provenance.locked()["distill@strong"]["artifacts/students/strong"]
    )
    assert not list(Path(".mlflow").rglob("weights"))  # they stay with DVC
    assert {"arm", "recipe", "eval.fingerprint", "mlflow.source.git.commit", "git.dirty", "exact_match"} <= set(now.tags)
    assert not {"eval.fingerprint", "data.statistics", "dvc.raw"} & set(version.tags), "a row of the registry is short"


@pytest.mark.parametrize(("right", "promoted"), [(0, False), (2, False), (3, True)])
def test_the_first_champion_knows_more_than_the_most_frequent_answers(
    right: int, promoted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = [("exist", "yes"), ("exist", "no"), ("count", "1"), ("count", "2")]
    answers = [
        Prediction(id=str(i), image_id="a", kind=kind, question="?", reference=reference, answer="", correct=i < right)
        for i, (kind, reference) in enumerate(references)
    ]
    monkeypatch.setattr(promote, "_recorded_answers", lambda _: (answers, None))
    tags = {"recipe": "smoke", "exact_match": str(right / 4)}
    version = mlflow_registry.Version(model="tests", number="1", arm="sft", md5="0", tags=tags)
    verdict = promote._verdict(version, None, load_settings(), measure=False)
    assert verdict.promoted is promoted
    assert f"{right / 4:.1%} on 4 questions, recipe smoke; the most frequent answer to each kind gives 50.0%" in verdict.why


def test_a_candidate_of_another_evaluation_is_to_be_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message named `--measure`, which had just been given."""
    answer = Prediction(id="1", image_id="a", kind="count", question="?", reference="1", answer="1", correct=True)
    monkeypatch.setattr(promote, "_recorded_answers", lambda _: ([answer], None))
    monkeypatch.setattr(promote, "_measure_answers", lambda *_: ([answer], None))
    new, old = (mlflow_registry.Version("tests", n, "sft", n, {"exact_match": "1"}) for n in "21")
    for measured, advice in ((False, "`alignti promote --measure` asks"), (True, "`make repro` and `alignti register`")):
        with pytest.raises(MeasuredDifferently, match=advice):
            promote._verdict(new, old, load_settings(), measure=measured)


def test_what_was_measured_differently_is_refused_or_measured_anew(trained: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    promote.register(["weak"], trained)
    promote.promote(None, trained)
    add_data("200")
    monkeypatch.setenv("ALIGNTI_TRACKING_URI", JOURNAL_ONLY)
    dvc_repro.reproduce_all(["evaluate@strong"])
    monkeypatch.setenv("ALIGNTI_TRACKING_URI", SQLITE)
    with pytest.raises(MeasuredDifferently, match=r"dataset hash: .*promote --measure"):
        promote.promote("strong", trained)

    monkeypatch.setattr(measure, "answers", todays_answers)
    verdict = promote.promote("strong", trained, measure=True)
    assert verdict.promoted and verdict.champion is not None and verdict.champion.exact_match == 0.5


def test_a_server_that_is_away_keeps_nothing_from_being_registered_later(
    trained: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    away = trained.model_copy(update={"runtime": trained.runtime.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})})
    assert promote.register(list(ARMS), away) == (list(ARMS), False)
    assert "`alignti sync` sends them later" in capsys.readouterr().err
    with pytest.raises(TryAgainError, match="the champion is as it was"):
        promote.promote(None, away)
    mlflow_sync.sync(SQLITE)
    candidate = mlflow_registry.by_alias(mlflow_client.client(SQLITE), "tests", mlflow_registry.CANDIDATE)
    assert candidate is not None and candidate.arm == "strong"
    Path("artifacts/scores/weak/scores.json").write_text("{}")
    with pytest.raises(DataError, match="weak was changed since"):
        promote.register(["weak"], trained)


def test_a_run_is_reproduced_to_the_byte_or_what_differs_is_named(trained: Settings, folder: Path) -> None:
    (journal,) = JOURNALS.glob("*-evaluate@weak-*.jsonl")
    (training,) = JOURNALS.glob("*-distill@weak-*.jsonl")
    study = Path("params/study.yaml").read_text()
    Path("params/study.yaml").write_text(study.replace("seed: 1", "seed: 7"))  # what is being edited does not count
    recorded = reproduce.find(journal.stem, trained)
    Path("ran.log").unlink()
    outcome = reproduce.reproduce(recorded, trained)
    assert outcome.same
    assert Path("ran.log").read_text().split() == ["prepare", "distill-weak", "evaluate-weak"]  # run, not restored

    recorded = reproduce.find(training.stem, trained)
    (folder / "salt").write_text(" salt")
    Path("ran.log").unlink()
    outcome = reproduce.reproduce(recorded, trained, stage_only=True)
    assert Path("ran.log").read_text().split() == ["distill-weak"]
    assert not outcome.same and outcome.timed == ["artifacts/students/weak/cost.json"] and not outcome.inputs
    assert "NOT the same bytes: artifacts/students/weak/model/weights" in str(outcome)

    mlflow_sync.sync(SQLITE)
    run_id = json.loads(training.with_suffix(".sent").read_text())["run_id"]
    assert reproduce.find(run_id, trained).outputs == recorded.outputs
    training.unlink()
    training.with_suffix(".sent").unlink()  # as on another machine: from MLflow alone
    elsewhere = reproduce.find(run_id, trained)
    assert (elsewhere.outputs, elsewhere.params, elsewhere.inputs) == (recorded.outputs, recorded.params, recorded.inputs)
    with pytest.raises(InputError, match="has a run 0000"):
        reproduce.find("0" * 32, trained)


def test_a_run_of_code_that_was_not_committed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNTI_TRACKING_URI", JOURNAL_ONLY)
    Path("components/skill-weak").write_text("0.6")
    Path("components/new.py").write_text("")
    Path("params/evaluate.yaml").write_text(Path("params/evaluate.yaml").read_text() + "\n")  # recorded, so no matter
    previous = set(JOURNALS.glob("*-distill@weak-*.jsonl"))
    dvc_repro.reproduce_all(["distill@weak"])
    (journal,) = set(JOURNALS.glob("*-distill@weak-*.jsonl")) - previous
    recorded = reproduce.find(journal.stem, load_settings())
    with pytest.raises(InputError, match=r"not committed \(components/skill-weak, components/new.py\)"):
        reproduce.reproduce(recorded, load_settings())


@pytest.mark.timeout(900)  # a whole pipeline, on a machine that may be busy
@pytest.mark.usefixtures("prefect_server")
def test_a_night_trains_what_is_new_and_promotes_or_says_why_not(
    trained: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote.register(["weak"], trained)
    promote.promote(None, trained)
    monkeypatch.setattr("components.tracking.stage_run._start_mirror", lambda *_: None)  # all is sent at the end
    with webhook() as (address, posts):
        monkeypatch.setenv("ALIGNTI_WEBHOOK", address)
        quiet = nightly.nightly()
        assert quiet["reasons"] == [] and "nothing was trained" in quiet["said"] and posts == []

        add_data("120")
        commit(skill_strong="0.8")
        monkeypatch.setattr(measure, "answers", todays_answers)
        night = nightly.nightly()
        data, moved, code = night["reasons"]
        assert data.startswith("new data: data is ") and "train/images 100 -> 120" in moved
        assert code.startswith("1 file(s) of code or params differ")
        assert night["verdict"]["promoted"] and night["verdict"]["candidate"]["arm"] == "strong"
        candidate = mlflow_registry.by_alias(mlflow_client.client(SQLITE), "tests", mlflow_registry.CANDIDATE)
        assert candidate is not None and candidate.arm == "strong"  # the pipeline registered what it made

        monkeypatch.setenv("ALIGNTI_TRACKING_URI", JOURNAL_ONLY)
        with pytest.raises(InputError, match="the champion is an alias in MLflow's registry"):
            nightly.nightly()
    champion, failed = (json.loads(body) for _, _, body in posts)
    assert champion["event"] == "champion" and champion["verdict"] == night["verdict"]
    assert failed["event"] == "failed" and failed["flow"] == "alignti-nightly"
    assert Path.cwd() == folder


def todays_answers(model: Path, title: str, settings: Settings) -> Any:
    """Answers of the model `weak` to today's questions; for a test whose students are no models."""
    assert (model / "weights").read_text() == "0.5"  # the champion's own, from DVC's cache
    measured = Scores.read(SCORES / "strong/scores.json").fingerprint
    strong = Prediction.read_lines(SCORES / "strong/predictions.jsonl")
    return [p.model_copy(update={"correct": index < 50}) for index, p in enumerate(strong)], measured
