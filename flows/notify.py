"""Webhook: one POST of JSON when a flow run fails or there is a new champion (docs/orchestration.md).

The URL is $ALIGNTI_WEBHOOK. It may hold a token, so neither it nor the text of an error is printed.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from datetime import UTC, datetime
from typing import Any

from components.errors import redact
from components.tracking import journal

WEBHOOK = "ALIGNTI_WEBHOOK"
TIMEOUT_S = 10
CHARS = 1000  # characters of a failure's message


def post(event: str, text: str, **facts: Any) -> bool:
    """POST one event; true if the webhook accepted it. An unreachable webhook costs a warning."""
    address = os.environ.get(WEBHOOK)
    if not address:
        return False
    payload = {"event": event, "text": text, "time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
    try:
        request = urllib.request.Request(address, json.dumps(payload).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            return True
    except (OSError, ValueError, http.client.HTTPException) as error:
        fault = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        journal.warn(f"the webhook of {WEBHOOK} did not take `{event}` ({fault})")
        return False


def failed(flow: Any, flow_run: Any, state: Any) -> None:
    """Prefect hook for failed or crashed flow runs; a subflow is reported by its parent."""
    if flow_run.parent_task_run_id is not None:
        return
    facts = {"flow": flow.name, "flow_run": flow_run.name, "flow_run_id": str(flow_run.id), "state": state.name}
    text = f"{flow.name}: flow run {flow_run.name} {state.name.lower()}"
    post("failed", text, **facts, message=redact(state.message or "")[:CHARS])
