"""Prefect around DVC: when and in what order. What is stale and what depends on what is DVC's to say."""

import os

QUIET = {  # nobody is told that you ran this, nothing is sold to you
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
}
STARTUP = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}  # a loaded machine needs more than Prefect's 20

for _name, _value in (QUIET | STARTUP).items():
    os.environ.setdefault(_name, _value)  # Prefect reads them when it is imported
