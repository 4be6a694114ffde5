"""Prefect flows around DVC: schedule and order. DVC decides what is stale and what depends on what."""

import os

QUIET = {  # no telemetry, no promotions
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
}
STARTUP = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}  # Prefect's 20 are too few on a loaded machine

for _name, _value in (QUIET | STARTUP).items():
    os.environ.setdefault(_name, _value)  # Prefect reads them when it is imported
