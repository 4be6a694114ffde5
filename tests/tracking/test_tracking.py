from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.config.runtime import RuntimeSettings
from components.errors import DataError, Interrupted, SettingsError
from components.records.distill import Cost
from components.records.evaluate import Scores
from components.records.paths import SCORES, STUDENTS
from components.study import runs as study_runs
from components.tracking import (
    history,
    journal,
    mlflow_client,
    mlflow_mirror,
    mlflow_registry,
    mlflow_sync,
    outcome,
    provenance,
    system_metrics,
)
from components.tracking.journal import JOURNALS, Run
from components.tracking.mlflow_mirror import Mirror
from components.tracking.stage_run import JOURNAL_ONLY, PARENT, stage_run

SQLITE = "sqlite:///.mlflow/mlflow.db"
REST: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "workers": None,
    "loaders": 0,
    "devices": 1,
    "accelerate": None,
    "teacher_device": "same",
    "teacher_sharded": False,
    "trackers": [],
    "experiment": "tests",
}


def runtime(uri: str = JOURNAL_ONLY) -> RuntimeSettings:
    return RuntimeSettings(tracking_uri=uri, **REST)


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # On a busy machine MLflow takes its time; here each run is waited for.
    monkeypatch.setattr("components.tracking.stage_run.PATIENCE_S", 120)
    monkeypatch.setattr("components.config.recipes.nearest", lambda: ("digits", 0))
    return tmp_path


def journals() -> list[Path]:
    return sorted(JOURNALS.glob("*.jsonl"))


def lines(journal: Path) -> list[dict[str, Any]]:
    """Without what the meter says of the machine: tests/tracking/test_system_metrics.py."""
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    return [e for e in events if not e.get("key", "").startswith("energy.") and not (e["event"] == "metrics" and _metered(e))]


def _metered(event: dict[str, Any]) -> bool:
    return all(name.startswith("system/") for name in event["values"])


def work(uri: str = JOURNAL_ONLY, steps: int = 3) -> None:
    """A stage that logs one of everything."""
    picture = Path("curve.png")
    picture.write_bytes(b"picture")
    with stage_run("distill", cell="align_ti", runtime=runtime(uri), params={"weights": {"sft": 1.0}, "seed": 1}) as run:
        for step in range(steps):
            run.metrics({"loss/sft": 3.0 - abs(step - 1), "accuracy": 0.1 * step}, step=step)
        run.dataset("digits", "d" * 64)
        run.tag("note", "hello")
        run.artifact(picture)


# --- the journal ------------------------------------------------------------------------------------------------------


def test_the_journal_holds_everything_in_order() -> None:
    work()
    (journal,) = journals()
    events = lines(journal)
    assert [e["event"] for e in events] == [
        "start",
        "params",
        *["metrics"] * 3,
        "dataset",
        "tag",
        "artifact",
        "metrics",
        "end",
    ]
    assert events[0]["name"] == "distill/align_ti"
    assert events[0]["tags"]["cell"] == "align_ti"
    assert events[1]["values"] == {"weights.sft": "1.0", "seed": "1"}
    assert events[-1]["status"] == "FINISHED"


def test_a_record_of_the_last_success_tells_how_long_it_took() -> None:
    assert history.last("distill@align_ti") is None
    work()
    last = history.last("distill@align_ti")
    assert last is not None and last.recipe == "digits"
    assert 0 <= last.seconds < 60
    (history.LAST / "distill@align_ti.json").write_text('{"run": "x"}')
    with pytest.raises(DataError, match=r"distill@align_ti\.json is damaged; delete it"):
        history.last("distill@align_ti")


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("x"), "FAILED"), (Interrupted("x"), "KILLED"), (KeyboardInterrupt(), "KILLED")]
)
def test_what_the_work_raises_passes_through_and_is_told(error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), stage_run("prepare", runtime=runtime()):
        raise error
    assert lines(journals()[0])[-1]["status"] == status
    assert history.last("prepare") is None


def test_params_that_cannot_be_read_cost_a_run_its_recipe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> None:
        raise SettingsError("params/data.yaml: missing")

    monkeypatch.setattr("components.config.recipes.nearest", unreadable)
    work()
    ((start, *_),) = [[json.loads(line) for line in path.read_text().splitlines()] for path in journals()]
    assert "recipe" not in start["tags"]
    assert json.loads((history.LAST / "distill@align_ti.json").read_text())["recipe"] is None


def test_only_rank_0_is_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    work()
    assert not journals()
    monkeypatch.delenv("WORLD_SIZE")
    work()
    assert journals()


def test_a_journal_that_cannot_be_written_is_one_warning(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / ".runs").write_text("in the way")
    with stage_run("prepare", runtime=runtime()) as run:
        run.metrics({"a": 1})
        done = True
    assert done
    assert capsys.readouterr().err.count("this run is not tracked") == 1


def test_mlflow_run_id_does_not_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)  # with it MLflow would reopen and rename that run
    with stage_run("prepare", runtime=runtime()):
        assert "MLFLOW_RUN_ID" not in os.environ


# --- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(workspace: Path, empty_database: Path) -> None:
    (workspace / ".mlflow").mkdir()
    shutil.copy(empty_database, ".mlflow/mlflow.db")


def client() -> Any:
    return mlflow_client.client(SQLITE)


def runs() -> dict[str, Any]:
    by_search = client().search_runs([client().get_experiment_by_name("tests").experiment_id])
    assert len({run.info.run_name for run in by_search}) == len(by_search)
    return {run.info.run_name: run for run in by_search}


def all_arrived(journal: Path) -> dict[str, int]:
    """Fails unless MLflow holds every event of this journal; returns the number of points of each metric."""
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    (run,) = client().search_runs(
        [e.experiment_id for e in client().search_experiments()], f"tags.`alignti.run` = '{journal.stem}'"
    )
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for event in events:
        if event["event"] == "metrics":
            for name, value in event["values"].items():
                points[name].append((event["step"] or 0, value))
        elif event["event"] == "params":
            assert event["values"].items() <= run.data.params.items()
        elif event["event"] == "tag":
            assert run.data.tags[event["key"]] == event["value"]
        elif event["event"] == "dataset":
            assert event["name"] in [values.dataset.name for values in run.inputs.dataset_inputs]
        elif event["event"] == "artifact":
            assert Path(event["path"]).name in [values.path for values in client().list_artifacts(run.info.run_id)]
    for name, values in points.items():
        history = client().get_metric_history(run.info.run_id, name)
        assert sorted((point.step, point.value) for point in history) == sorted(values), name
    assert events[0]["tags"].items() <= run.data.tags.items()
    assert run.info.status == events[-1]["status"]
    return {name: len(values) for name, values in points.items()}


def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command of every sender that is started from now on."""
    commands: list[list[str]] = []
    popen = subprocess.Popen

    def noting(command: Any, **options: Any) -> Any:
        commands.extend([command] if "components.tracking.mlflow_sync" in command else [])
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", noting)
    return commands


def test_artifacts_that_a_server_keeps_are_asked_of_that_server() -> None:
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    mlflow_client.client("http://127.0.0.1:9")
    assert MlflowArtifactsRepository("mlflow-artifacts:/1/x/artifacts").artifact_uri.startswith("http://127.0.0.1:9/")


@pytest.mark.usefixtures("database")
def test_everything_arrives_in_mlflow_under_one_parent_per_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    senders = started(monkeypatch)
    with stage_run("pipeline", runtime=runtime(SQLITE), metered=False) as parent:
        monkeypatch.setenv(PARENT, parent.id)
        work(SQLITE)
        with stage_run("compare", runtime=runtime(SQLITE)) as last:
            last.headline({"kd/exact_match": 0.5}, "kd leads")
    assert len(senders) == 1, "the flow's own sends its stages' journals, too"
    by_name = runs()
    assert set(by_name) == {"pipeline/digits", "distill/align_ti", "compare"}
    above = by_name["pipeline/digits"].data
    assert (above.metrics["kd/exact_match"], above.tags["mlflow.note.content"]) == (0.5, "kd leads")
    run = by_name["distill/align_ti"]
    assert run.data.tags["mlflow.parentRunId"] == by_name["pipeline/digits"].info.run_id
    assert run.data.params == {"weights.sft": "1.0", "seed": "1"}
    assert [p.value for p in client().get_metric_history(run.info.run_id, "loss/sft")] == [2.0, 3.0, 2.0]
    assert run.data.tags["note"] == "hello"
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    assert [a.path for a in client().list_artifacts(run.info.run_id)] == ["curve.png"]
    assert Path(".mlflow/artifacts").resolve().as_uri() in run.info.artifact_uri
    assert {r.info.status for r in by_name.values()} == {"FINISHED"}


@pytest.mark.usefixtures("database")
def test_a_stage_sends_its_journal_itself_where_no_living_flow_does(monkeypatch: pytest.MonkeyPatch) -> None:
    senders = started(monkeypatch)
    with stage_run("pipeline", runtime=runtime(), metered=False) as gone:
        pass
    for parent in (gone.id, "elsewhere"):
        monkeypatch.setenv(PARENT, parent)
        work(SQLITE)
    assert len(senders) == 2


@pytest.mark.usefixtures("database")
def test_a_damaged_journal_of_one_stage_does_not_keep_back_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with stage_run("pipeline", runtime=runtime(SQLITE), metered=False) as parent:
        monkeypatch.setenv(PARENT, parent.id)
        with stage_run("prepare", runtime=runtime(SQLITE)) as damaged, (JOURNALS / f"{damaged.id}.jsonl").open("a") as file:
            file.write("no event\n")
        work(SQLITE)
    assert {"pipeline/digits", "distill/align_ti"} <= set(runs())
    stderr = capfd.readouterr().err
    assert stderr.count("tracking:") == 1 and f"{damaged.id}.jsonl holds a line that is no event" in stderr


@pytest.mark.usefixtures("database")
def test_sync_sends_what_is_left_once_however_often_it_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    work(steps=600)  # more than one call to MLflow takes
    Path("curve.png").unlink()  # what is sent later is what was there then

    def broken(*_: Any) -> None:
        raise ConnectionError("the server went away")

    for method in ("_dataset", "_artifact", "_end"):
        with monkeypatch.context() as fault:
            fault.setattr(mlflow_mirror.Mirror, method, broken)
            with pytest.raises(ConnectionError):
                mlflow_sync.sync(SQLITE)
    # Killed between making the run and noting which it was:
    journals()[0].with_suffix(".sent").unlink()
    assert mlflow_sync.sync(SQLITE) == (1, 0)
    assert mlflow_sync.sync(SQLITE) == (0, 0)
    (run,) = runs().values()
    history = client().get_metric_history(run.info.run_id, "accuracy")
    assert sorted(point.step for point in history) == list(range(600))
    assert [a.path for a in client().list_artifacts(run.info.run_id)] == ["curve.png"]


@pytest.mark.usefixtures("database")
def test_names_that_mlflow_has_no_room_for_are_made_to_fit_and_a_refused_run_keeps_no_other_back() -> None:
    with stage_run("pipeline", runtime=runtime()) as run:
        run.tag("stage.distill@sft", "ran")
    with stage_run("broken", runtime=runtime()) as run:
        run.params({"a": 1})
        run.params({"a": 2})  # which MLflow refuses
    work()
    for path in journals():
        if "broken" in path.name:
            path.rename(path.with_name("1-broken.jsonl"))  # comes first
    with pytest.raises(Exception, match="'a'"):
        mlflow_sync.sync(SQLITE)
    assert runs()["pipeline"].data.tags["stage.distill_sft"] == "ran"
    assert runs()["distill/align_ti"].info.status == "FINISHED"


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("damage", [b"\xff\n", b"{\n", b"7\n"])
def test_a_damaged_journal_is_named_and_keeps_no_other_back(damage: bytes) -> None:
    work()
    (JOURNALS / "0-damaged.jsonl").write_bytes(damage)
    with pytest.raises(DataError, match=r"0-damaged\.jsonl"):
        mlflow_sync.sync(SQLITE)
    assert runs()["distill/align_ti"].info.status == "FINISHED"


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("for_good", [False, True])
def test_a_run_that_mlflow_no_longer_has_is_sent_anew(for_good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ConnectionError

    work()
    with monkeypatch.context() as fault:
        fault.setattr(mlflow_mirror.Mirror, "_end", broken)
        with pytest.raises(ConnectionError):
            mlflow_sync.sync(SQLITE)
    (run,) = runs().values()
    store = client()._tracking_client.store
    (store._hard_delete_run if for_good else store.delete_run)(run.info.run_id)
    assert mlflow_sync.sync(SQLITE) == (1, 0)
    assert all_arrived(journals()[0])["loss/sft"] == 3


@pytest.mark.usefixtures("database")
def test_a_run_whose_parent_was_deleted_is_sent_to_its_end() -> None:
    run = Run(JOURNALS / "20260101T000000-compare-0a0a0a0a.jsonl")
    parent = {"id": "dvc-host-1-2", "name": "dvc repro", "ends_with_stages": True, "tags": {}}
    run.write("start", name="compare", experiment="tests", parent=parent, tags={"stage": "compare"})
    mirror = Mirror(journals()[0], SQLITE)
    mirror.send()
    client().delete_run(runs()["dvc repro"].info.run_id)
    run.headline({"sft/exact_match": 0.5}, "sft is in front")
    run.end("FINISHED")
    assert mirror.send() and runs()["compare"].info.status == "FINISHED"


@pytest.mark.usefixtures("database")
def test_a_deleted_experiment_is_named_with_what_brings_it_back() -> None:
    experiment = client().create_experiment("tests")
    client().delete_experiment(experiment)
    work()
    with pytest.raises(DataError, match=f"'tests' was deleted in MLflow: `mlflow experiments restore -x {experiment}`"):
        mlflow_sync.sync(SQLITE)


KINDS = ("plain", "animals/", "a//b", "..", ".", "/a", "a/../b", "a?b", "a_b", "x" * 300, "x" * 301, "红色", "🐢", "🐍", "a\nb")


@pytest.mark.usefixtures("database")
def test_every_name_that_a_user_may_choose_arrives_in_mlflow_and_none_takes_anothers_place() -> None:
    with stage_run("evaluate", runtime=runtime()) as run:
        run.metrics({f"exact_match/{kind}": i for i, kind in enumerate(KINDS)})
        run.metrics({kind: i for i, kind in enumerate(KINDS)}, step=1)
        run.params({kind: i for i, kind in enumerate(KINDS)})
        run.tag("/" + "x" * 300, "x" * 9000)
    assert mlflow_sync.sync(SQLITE) == (1, 0)
    sent = runs()["evaluate"].data
    scores = {name: value for name, value in sent.metrics.items() if name.startswith("exact_match/")}
    assert sorted(scores.values()) == list(range(len(KINDS))) and scores["exact_match/plain"] == 0
    assert sorted(map(int, sent.params.values())) == list(range(len(KINDS)))


def _stage(name: str, **environment: str) -> subprocess.Popen[bytes]:
    code = (
        "import sys\nfrom components.tracking.stage_run import stage_run\n"
        "from tests.tracking.test_tracking import SQLITE, runtime\n"
        "with stage_run('demo', sys.argv[1], runtime=runtime(SQLITE)) as run: run.metrics({'a': 1.0})"
    )
    command = [sys.executable, "-c", code, name]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment})


def test_stages_that_make_the_database_together_all_arrive() -> None:
    for stage in [_stage(f"c{i}") for i in range(4)]:
        assert stage.wait() == 0
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not all((history.sync_state(j.stem) or {}).get("done") for j in journals()):
        time.sleep(0.2)
    assert mlflow_sync.sync(SQLITE) == (0, 0)
    assert set(runs()) == {f"demo/c{i}" for i in range(4)}


def test_whoever_was_killed_while_making_the_database_costs_nobody_a_run(workspace: Path) -> None:
    """Half a database under its final name, as MLflow itself leaves it, and half a draft, as we do."""
    database = workspace / ".mlflow/mlflow.db"
    for half in (database, database.with_suffix(".draft")):
        half.parent.mkdir(exist_ok=True)
        with contextlib.closing(sqlite3.connect(half)) as partial:
            partial.execute("create table experiments (experiment_id integer)")
    work()
    assert mlflow_sync.sync(SQLITE) == (1, 0)
    assert all_arrived(journals()[0])["loss/sft"] == 3
    assert not list(database.parent.glob("*.draft*"))


@pytest.mark.usefixtures("database")
def test_a_database_that_holds_runs_is_never_replaced(workspace: Path) -> None:
    work()
    mlflow_sync.sync(SQLITE)
    database = workspace / ".mlflow/mlflow.db"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("update alembic_version set version_num = 'of a later release'")
    original = database.read_bytes()
    (workspace / "elsewhere").mkdir()
    shutil.copy(database, workspace / "elsewhere/mlflow.db")  # MLflow keeps the other one open
    with pytest.raises(Exception, match=r"schema|revision"):
        mlflow_client.client("sqlite:///elsewhere/mlflow.db").search_experiments()
    assert (workspace / "elsewhere/mlflow.db").read_bytes() == original


@pytest.mark.usefixtures("database")
def test_a_clone_that_was_copied_keeps_its_pictures_to_itself(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work()
    mlflow_sync.sync(SQLITE)
    copied = workspace / "a copy's folder"
    shutil.copytree(workspace / ".mlflow", copied / ".mlflow")
    shutil.rmtree(workspace / ".mlflow/artifacts")
    monkeypatch.chdir(copied)
    with stage_run("later", runtime=runtime()) as run:
        run.artifact(workspace / "curve.png")
    assert mlflow_sync.sync(SQLITE) == (1, 0)
    for logged in runs().values():  # those from before the move too
        assert [a.path for a in client().list_artifacts(logged.info.run_id)] == ["curve.png"]
        assert logged.info.artifact_uri.startswith((copied / ".mlflow/artifacts").as_uri())
    assert not (workspace / ".mlflow/artifacts").exists()


@pytest.mark.usefixtures("database")
def test_an_outcome_is_recorded_once_beside_no_parent_and_found_by_the_page_that_compares_arms(workspace: Path) -> None:
    keys = []
    for arm in ("kd", "kd-1"):
        scores = Scores(
            arm=arm, samples=2, exact_match=0.5, per_kind={"a": 0.5}, yes_no={}, token_f1=0.5, token_f1_per_kind={"a": 0.5}
        )
        (SCORES / arm).mkdir(parents=True)
        scores.write(SCORES / arm / "scores.json")
        (SCORES / arm / "predictions.jsonl").write_text("")
        Cost(train_seconds=36.0, peak_memory_mib=1.0, device="cpu", steps=3).write(STUDENTS / arm / "cost.json")
        varied = outcome.varied({"kd": {"weights": {"kd": 1}, "seed": 1}, "kd-1": {"weights": {}, "seed": 1}})[arm]
        for _ in range(2):
            key = outcome.record(arm, "0123", varied, runtime().model_copy(update={"devices": 2}))
        keys.append(key)
    assert len(journals()) == 2 and outcome.comparison(keys[:1], "http://x") is None
    assert mlflow_sync.sync(SQLITE) == (2, 0)
    registered = {"made_by": "", "candidate": True, "params": {}, "description": "", "tags": {"arm": "kd-1", "dvc.md5": "0123"}}
    assert journal.register(key, **registered) and not journal.register(key, **registered)
    assert mlflow_sync.sync(SQLITE) == (1, 0), "what a journal gained after its run was sent"
    assert mlflow_sync.sync(SQLITE) == (0, 0)
    by_name = runs()
    run = by_name["kd-1"]
    candidate = mlflow_registry.by_alias(client(), "tests", "candidate")
    assert candidate and candidate.tags["run.scores"] == run.info.run_id
    assert "mlflow.parentRunId" not in run.data.tags
    assert run.info.status == "FINISHED"
    assert (run.data.tags["stage"], run.data.tags["dvc.md5"], run.data.params) == ("arm", "0123", {"weights.kd": "0.0"})
    assert run.data.metrics["exact_match"] == 0.5 and run.data.metrics["cost/device_hours"] == 0.02  # two devices, 36 s
    address = outcome.comparison(keys, "http://x")
    assert address and all(run.info.run_id in address for run in by_name.values())


@pytest.mark.usefixtures("database")
def test_results_that_are_restored_are_the_latest_again(workspace: Path) -> None:
    """A study changed and changed back: `alignti compare` showed the runs between."""
    cost = Cost(train_seconds=36.0, peak_memory_mib=1.0, device="cpu", steps=3)
    cost.write(STUDENTS / "kd" / "cost.json")
    (SCORES / "kd").mkdir(parents=True)
    (SCORES / "kd" / "predictions.jsonl").write_text("")
    scores = Scores(
        arm="kd", samples=2, exact_match=0.5, per_kind={"a": 0.5}, yes_no={}, token_f1=0.5, token_f1_per_kind={"a": 0.5}
    )
    student = {"made_by": "", "candidate": True, "params": {}, "description": "", "tags": {"arm": "kd", "dvc.md5": "0"}}
    latest, registered = [], []
    for exact_match in (0.25, 0.75, 0.25, 0.25):
        scores.model_copy(update={"exact_match": exact_match}).write(SCORES / "kd" / "scores.json")
        key = outcome.record("kd", "0", {}, runtime(), outcome.CELL, study="terms", variant="kd")
        registered.append(journal.register(key, **student))
        mlflow_sync.sync(SQLITE)
        latest.append(max(study_runs.read(client(), "tests", "terms"), key=lambda run: run.started).metrics["exact_match"])
    assert latest == [0.25, 0.75, 0.25, 0.25] and len(journals()) == 2
    assert registered == [True, True, True, False]


# --- stages of dvc.yaml: what they read and make, and going on ----------------------------------------------------------

STAGES = """
stages:
  distill:
    foreach: [align_ti]
    do:
      cmd: python -m components.distill --arm ${key}
      deps: [data, components/code.py]
      params:
        - params/study.yaml:
            - arms.${key}
      outs: ["artifacts/students/${key}"]
"""


@pytest.fixture
def stage(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose dvc.yaml has the stage distill@align_ti."""
    for name, text in {
        "dvc.yaml": STAGES,
        "data.dvc": "outs:\n- {md5: 0123.dir, path: data}\n",
        "params/study.yaml": "arms: {align_ti: {seed: 1}, other: {seed: 1}}\n",
        "components/code.py": "1\n",
        "artifacts/students/align_ti/model/weights": "bytes",
    }.items():
        path = workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("DVC_STAGE", "distill@align_ti")
    return workspace


def stopped(uri: str = JOURNAL_ONLY) -> None:
    """A training that is stopped after two steps."""
    with pytest.raises(Interrupted), stage_run("distill", cell="align_ti", runtime=runtime(uri)) as run:
        for step, loss in enumerate((0.5, 9.0)):
            run.metrics({"loss/sft": loss}, step=step)
        raise Interrupted("x")


@pytest.mark.usefixtures("database")
def test_a_stopped_stage_goes_on_in_its_run_and_tells_what_it_read_and_made(stage: Path) -> None:
    stopped(SQLITE)
    (journal,) = journals()
    with journal.open("a") as file:
        file.write('{"event": "metr')  # what a kill may leave
    (stage / "params/study.yaml").write_text("arms: {align_ti: {seed: 1}, other: {seed: 2}}\n")  # none of its params
    work(SQLITE)
    assert journals() == [journal]
    (run,) = runs().values()
    assert (run.info.status, run.data.tags["attempts"]) == ("FINISHED", "2")
    history = client().get_metric_history(run.info.run_id, "loss/sft")
    assert [(p.step, p.value) for p in history] == [(0, 0.5), (1, 9.0), (0, 2.0), (1, 3.0), (2, 2.0)]
    md5 = provenance.digest(stage / "artifacts/students/align_ti").md5
    assert run.data.tags["out.artifacts/students/align_ti"] == md5
    assert provenance.maker(md5) == journal.stem
    assert {i.dataset.name: i.dataset.digest for i in run.inputs.dataset_inputs}["data"] == "0123.dir"
    assert {a.path for a in client().list_artifacts(run.info.run_id)} == {"curve.png", "made", "origin.json"}
    work(SQLITE)
    assert len(journals()) == 2  # what is finished is not gone on with


@pytest.mark.usefixtures("stage")
def test_what_a_stopped_stage_used_is_counted_with_what_it_uses_as_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics.Meter, "energy", lambda _: {system_metrics.CPU_WH: 2.0})
    monkeypatch.setattr("os.times", lambda: SimpleNamespace(user=3600.0, system=0, children_user=0, children_system=0))
    stopped()
    work()
    (journal,) = journals()
    used = {k: v for e in lines(journal) if e["event"] == "metrics" for k, v in e["values"].items() if "usage/" in k}
    assert used["usage/cpu_wh"] == 4.0 and used["usage/cpu_hours"] == 2.0
    assert history.energy(journal.stem) == {"usage/cpu_wh": 4.0}


@pytest.mark.usefixtures("database")
def test_a_finished_run_that_is_sent_again_stays_finished(stage: Path) -> None:
    """As an arm's, that every `compare` follows."""
    work()
    (journal,) = journals()
    for _ in range(2):
        mirror = Mirror(journal, SQLITE)
        mirror.send()
        assert mirror.send(abandoned=True)
        (run,) = client().search_runs([client().get_experiment_by_name("tests").experiment_id])
        assert run.info.status == "FINISHED"


@pytest.mark.parametrize("damaged", [".runs/unfinished/*", ".runs/journal/*.jsonl"])
def test_what_is_noted_of_a_stopped_stage_may_be_damaged(stage: Path, damaged: str, capsys: pytest.CaptureFixture[str]) -> None:
    stopped()
    (file,) = stage.glob(damaged)
    file.write_bytes(b"\xff\n")
    work()
    assert f"tracking: {file.relative_to(stage)}" in capsys.readouterr().err


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("change", ["params/study.yaml", "components/code.py", "data.dvc"])
def test_a_stopped_stage_that_would_make_something_else_now_opens_a_linked_run(stage: Path, change: str) -> None:
    stopped()
    path = stage / change
    path.write_text(path.read_text().replace("1", "7"))
    work()
    first, second = sorted(journals(), key=lambda journal: int(lines(journal)[0]["time"]))
    assert mlflow_sync.sync(SQLITE) == (2, 0)
    experiment = client().get_experiment_by_name("tests").experiment_id
    by_journal = {run.data.tags["alignti.run"]: run for run in client().search_runs([experiment])}
    assert by_journal[second.stem].data.tags["resumed_from"] == by_journal[first.stem].info.run_id
    assert by_journal[first.stem].info.status == "KILLED"


def test_a_stage_that_another_process_is_running_is_not_gone_on_with(stage: Path) -> None:
    with stage_run("distill", cell="align_ti", runtime=runtime()):
        assert len(journals()) == 1
        work()
    assert len(journals()) == 2


@pytest.mark.usefixtures("database")
def test_restored_bytes_are_linked_to_the_run_that_made_them(stage: Path) -> None:
    work()
    (maker,) = journals()
    output = provenance.digest(stage / "artifacts/students/align_ti")
    with stage_run("pipeline", runtime=runtime()) as run:
        run.link("stage.known", provenance.maker(output.md5))
        run.link("stage.elsewhere", None, "artifacts/students/align_ti", output.md5)  # as on a machine without that journal
        run.link("stage.nowhere", None, "artifacts/students/align_ti", "0000.dir")
    mlflow_sync.sync(SQLITE)
    by_name = runs()
    tags = by_name["pipeline"].data.tags
    assert by_name["distill/align_ti"].data.tags["alignti.run"] == maker.stem
    assert tags["stage.known"] == tags["stage.elsewhere"] == by_name["distill/align_ti"].info.run_id
    assert "stage.nowhere" not in tags


def test_a_dvc_yaml_that_cannot_be_read_costs_a_warning(stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stage / "dvc.yaml").write_text("stages: [\n")
    work()
    assert "is not tracked: ParserError" in capsys.readouterr().err
    assert lines(journals()[0])[-1]["status"] == "FINISHED"


ROOT = str(Path(__file__).parents[2])
KILLED = f"""
import sys, time
from components.tracking.stage_run import stage_run
from components.config.runtime import RuntimeSettings
runtime = RuntimeSettings(tracking_uri="journal", **{REST!r})
with stage_run("distill", cell="a", runtime=runtime) as run:
    run.metrics({{"loss/sft": 1.0}}, step=1)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.usefixtures("database")
def test_a_killed_run_is_left_alone_while_it_lives_and_sent_as_killed_after() -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ROOT})
    assert process.stdout is not None
    process.stdout.readline()
    assert mlflow_sync.sync(SQLITE) == (0, 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with journals()[0].open("a") as journal:
        journal.write('{"event": "metr')  # half a line
    assert mlflow_sync.sync(SQLITE) == (1, 0)
    (run,) = runs().values()
    assert run.info.status == "KILLED"
    assert run.data.metrics == {"loss/sft": 1.0}


@pytest.mark.usefixtures("database")
def test_stages_of_one_dvc_process_share_a_parent_that_ends_with_them(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dvc` is found by walking up from the stage; here a script of that name stands for it."""
    fake = workspace / "dvc"
    stage = (
        "from components.tracking.stage_run import stage_run\n"
        "from tests.tracking.test_tracking import runtime\n"
        "with stage_run({!r}, runtime=runtime()): pass"
    )
    calls = "\n".join(
        f"subprocess.run([sys.executable, '-c', {stage.format(name)!r}], check=True)" for name in ("prepare", "compare")
    )
    fake.write_text(f"import subprocess, sys\n{calls}")
    environment = {**os.environ, "DVC_STAGE": "x", "PYTHONPATH": ROOT}
    subprocess.run([sys.executable, str(fake)], check=True, env=environment)
    parents = [lines(journal)[0]["parent"] for journal in journals()]
    assert len(parents) == 2
    assert parents[0] == parents[1]
    mlflow_sync.sync(SQLITE)
    by_name = runs()
    (parent,) = (run for name, run in by_name.items() if name.startswith("dvc repro"))
    assert {by_name[name].data.tags["mlflow.parentRunId"] for name in ("prepare", "compare")} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"


def test_outside_dvc_and_flow_a_run_has_no_parent() -> None:
    work()
    assert lines(journals()[0])[0]["parent"] is None


# --- faults -----------------------------------------------------------------------------------------------------------


@contextmanager
def server(*answers: int | None) -> Iterator[str]:
    """An HTTP server that answers requests with `answers` in turn, and the last one on; None: never."""
    left = list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = left.pop(0) if len(left) > 1 else left[0]
            if answer is None:
                time.sleep(60)
            else:
                self.send_error(answer)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        thread.join()


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("fault", ["down", "answers 500", "never answers", "not installed"])
def test_a_fault_of_mlflow_is_one_warning_and_an_unsent_journal_without_secrets(
    fault: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    if fault == "not installed":
        (workspace / "mlflow.py").write_text("raise ImportError('No module named mlflow')")
        monkeypatch.setenv("PYTHONPATH", str(workspace))
        work(SQLITE)
    elif fault == "down":
        work("http://user:canary-password@127.0.0.1:9")
    else:
        with server(500 if fault == "answers 500" else None) as address:
            work(address.replace("//", "//user:canary-password@"))
    stderr = capfd.readouterr().err
    assert stderr.count("tracking:") == 1
    assert "`alignti sync` sends it later" in stderr
    assert "canary" not in stderr
    assert b"canary" not in b"".join(path.read_bytes() for path in workspace.rglob("*") if path.is_file())

    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert mlflow_sync.sync(SQLITE) == (1, 0)  # once MLflow is back, all of it
    assert all_arrived(journals()[0])["loss/sft"] == 3
