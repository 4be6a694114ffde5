"""Every test runs offline, on one thread, without telemetry. Set here, before torch or Prefect are imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from flows import QUIET, STARTUP

os.environ |= {
    "OMP_NUM_THREADS": "1",  # with two, another process on a core costs an order of magnitude: OpenMP spins while it waits
    "ALIGNTI_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DVC_NO_ANALYTICS": "1",
    **QUIET,
    **STARTUP,
    "ALIGNTI_TRACKING_URI": "journal",  # MLflow only where a test asks for it
}
for _name in ("ALIGNTI_PARENT_RUN_ID", "MLFLOW_RUN_ID", "DVC_STAGE", "RANK"):
    os.environ.pop(_name, None)


hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server of this session's own; it takes ten seconds to start."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make one."""
    from components.tracking import mlflow_client

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_client.client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def flex_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention uncompiled, whose arithmetic differentiates on a CPU too: only its check of the device forbids that."""
    import torch
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield
