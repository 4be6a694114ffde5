"""Registration of students in MLflow, whatever the experiment is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.tracking import mlflow_client, mlflow_registry


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


NAMES = {"align-ti": "align-ti", "/Users/me/x": "-Users-me-x", "o'brien: x": "o-brien- x", ".": "-"}


@pytest.mark.parametrize(("experiment", "model"), NAMES.items())
def test_every_experiment_has_a_model_that_mlflow_takes(
    experiment: str, model: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client = mlflow_client.client(uri)
    run = client.create_run(client.create_experiment(experiment)).info.run_id
    tags = {"arm": "sft", mlflow_registry.MD5: "5" * 32, "exact_match": "0.5"}
    line = {"made_by": "none", "candidate": True, "time": 1, "description": "an arm", "params": {}, "tags": tags}
    for _ in range(2):  # sent again after an interruption
        mlflow_registry.register(client, run, line)
    version = mlflow_registry.by_alias(client, mlflow_registry.model_name(experiment), mlflow_registry.CANDIDATE)
    assert version is not None and (version.model, version.number, version.arm) == (model, "1", "sft")


def test_a_version_has_the_scores_measured_last(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal weights: `alignti promote` compared the answers to questions of before."""
    monkeypatch.chdir(tmp_path)
    client = mlflow_client.client(uri)
    experiment = client.create_experiment("rescored")
    lines = []
    for time, scores in enumerate(("a", "b"), 1):
        tags = {"arm": "sft", mlflow_registry.MD5: "6" * 32, "exact_match": f"0.{time}", "dvc.scores": scores, "recipe": scores}
        line = {"made_by": "none", "candidate": True, "time": time, "description": scores, "params": {}, "tags": tags}
        lines.append((client.create_run(experiment).info.run_id, line))
    for run, line in (*lines, lines[0]):  # the first is sent again: another database, a state that was deleted
        mlflow_registry.register(client, run, line)
    version = mlflow_registry.by_alias(client, "rescored", mlflow_registry.CANDIDATE)
    assert version is not None and version.number == "1"
    read = (version.tags["dvc.scores"], version.tags["exact_match"], version.tags["run.scores"], version.tags["recipe"])
    assert read == ("b", "0.2", lines[1][0], "a")
    stored = client.get_model_version("rescored", "1")
    assert stored.description == "b" and "dvc.scores" not in stored.tags, "a row of the registry is short"
