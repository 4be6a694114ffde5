"""What a flow run shows on its page, as Prefect's server has it, and that a flow does not fail for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterName
from prefect.client.schemas.sorting import FlowRunSort

from components.config.load import load_settings
from components.evaluate.compare import compare
from components.evaluate.load_results import read
from components.records.compare import Comparison
from components.tracking.journal import JOURNALS, Run
from flows import dvc_repro, prefect_artifacts
from flows.pipeline import pipeline
from tests.evaluate.study import ARMS, study_arms, write_study
from tests.evaluate.test_compare import SETTINGS

pytestmark = pytest.mark.usefixtures("prefect_server")


def last_artifacts() -> dict[str, Any]:
    """The artifacts of the last flow run, by key."""
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(like_="")), sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1
        )
        artifacts = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id])))
    return {artifact.key: artifact for artifact in artifacts if artifact.key}


def outcomes() -> dict[str, str]:
    return {row["name"]: row["outcome"] for row in json.loads(last_artifacts()["stages"].data)}


def test_progress_and_what_became_of_each_stage(project: Path) -> None:
    assert pipeline() == outcomes()
    assert last_artifacts()["stages-progress"].data == 100
    assert last_artifacts()["stages-progress"].description.startswith("4 of 4 stages done; the last was last,")


def test_a_stage_speaks_in_the_log_of_its_flow_run_and_its_bar_moves_an_artifact(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (project / "stage.py").read_text()
    bars = "\\r".join(f"distill: {percent:3}%|#| 1/100" for percent in range(0, 101, 5))
    prints = f"print('{bars}')\nprint('tracking: MLflow is away')\nprint('   git add dvc.lock')\n"
    (project / "stage.py").write_text(prints + text)
    pipeline(targets=["first"])
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert last_artifacts()["progress-first"].data == 100
    assert sum("%|" in line for _, line in lines) == 10 and ("WARNING", "tracking: MLflow is away") in lines
    assert not any("git add" in line for _, line in lines)


def test_a_failed_stage_says_why_and_what_needs_it_that_it_did_not_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    (project / "stage.py").write_text("import os, sys; sys.exit('401 for ' + os.environ['HF_TOKEN'])")
    with pytest.raises(dvc_repro.StageFailed, match="stage first failed"):
        pipeline()
    assert "401 for ***" in outcomes()["first"]
    assert outcomes()["last"].startswith("not run")


def test_what_prefect_does_not_take_costs_a_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(**_: Any) -> None:
        raise ConnectionError("no answer from http://user:canary@prefect:4200")

    for name in ("create_progress_artifact", "create_table_artifact", "create_link_artifact"):
        monkeypatch.setattr(prefect_artifacts, name, refused)
    assert set(pipeline().values()) == {"ran"}
    assert last_artifacts() == {}
    warnings = [record.getMessage() for record in caplog.records if "not shown" in record.getMessage()]
    assert len(warnings) == 2 and "http://***@prefect:4200" in warnings[0]


def test_the_leaderboard_and_the_ways_to_mlflow_and_the_report(project: Path) -> None:
    """The files and the journal's note are as `compare` and the mirror leave them; no MLflow answers at the address."""
    runtime = load_settings().runtime.model_copy(update={"tracking_uri": "http://me:canary@127.0.0.1:5000"})
    write_study(project, pictures=False)
    compare(read(ARMS), SETTINGS.model_copy(update={"bootstrap_resamples": 100}), study_arms()).write(
        prefect_artifacts.COMPARISON
    )
    prefect_artifacts.REPORT.write_text("<html>")

    @contextmanager
    def opened() -> Iterator[Run]:
        run = Run(JOURNALS / "20260101T000000-pipeline-0.jsonl")
        yield run
        (JOURNALS / f"{run.id}.sent").write_text(json.dumps({"run_id": "f" * 32, "experiment": "7", "done": True}))

    @flow
    def telling() -> None:
        with prefect_artifacts.linked(runtime, opened()):
            prefect_artifacts.leaderboard()

    telling()
    rows = json.loads(last_artifacts()["leaderboard"].data)
    assert [row["arm"] for row in rows] == ["teacher", *Comparison.read(prefect_artifacts.COMPARISON).order]
    assert rows[1]["exact match"].endswith("%") and " to " in rows[1]["95%"]
    assert f"(http://127.0.0.1:5000/#/experiments/7/runs/{'f' * 32})" in last_artifacts()["mlflow-run"].data
    assert f"{'f' * 32}/artifacts/report.html)" in last_artifacts()["report"].data
    assert (JOURNALS / "20260101T000000-pipeline-0.files/report.html").exists()  # for MLflow to keep
