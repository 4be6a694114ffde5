"""A real training whose tracking server fails under it."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.config.load import load_settings
from components.distill.__main__ import distill
from components.records.paths import STUDENTS
from components.tracking import mlflow_sync
from components.tracking.stage_run import stage_run
from tests.distill.conftest import STEPS
from tests.tracking.test_tracking import SQLITE, all_arrived, journals, server


def test_a_training_ends_while_its_server_fails_and_nothing_of_it_is_lost(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with server(500, None) as address:  # first broken, then it hangs; and gone in the end
        monkeypatch.setenv("ALIGNTI_TRACKING_URI", address)
        settings = load_settings()
        with stage_run("distill", "kd", runtime=settings.runtime, params={"arm": "kd"}) as run:
            distill("kd", settings.arm("kd"), settings, run)
            run.artifact(STUDENTS / "kd/losses.jsonl")
    assert (STUDENTS / "kd/model/model.safetensors").exists()
    assert capfd.readouterr().err.count("tracking: MLflow at") == 1
    assert mlflow_sync.sync(SQLITE) == (1, 0)  # another place, later
    sent = all_arrived(journals()[0])
    assert sent["loss/total"] == STEPS
