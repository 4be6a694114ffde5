from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from flows import notify


@contextmanager
def webhook(status: int = 200) -> Iterator[tuple[str, list[Any]]]:
    """Its address, with a token in it, and what was posted there."""
    posts: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posts.append((self.path, self.headers["Content-Type"], self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hooks/canary-token", posts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_failed_flow_run_is_told_with_the_documented_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(parent_task_run_id=None, name="brave-newt", id="f00")
    state = SimpleNamespace(name="Crashed", message="pull http://user:canary@host failed " + "x" * 5000)
    with webhook() as (address, posts):
        monkeypatch.setenv(notify.WEBHOOK, address)
        notify.failed(SimpleNamespace(name="alignti-nightly"), run, state)
        run.parent_task_run_id = "a flow run inside another"
        notify.failed(SimpleNamespace(name="alignti-pipeline"), run, state)
    ((path, kind, body),) = posts
    payload = json.loads(body)
    assert (path, kind) == ("/hooks/canary-token", "application/json")
    assert set(payload) == {"event", "text", "time", "flow", "flow_run", "flow_run_id", "state", "message"}
    assert (payload["event"], payload["text"]) == ("failed", "alignti-nightly: flow run brave-newt crashed")
    assert "canary" not in payload["message"] and len(payload["message"]) == notify.CHARS


@pytest.mark.parametrize("fault", ["answers 500", "is away", "is no address"])
def test_a_webhook_that_fails_is_one_line_without_the_address(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with webhook(500) as (address, _):
        address = {"answers 500": address, "is away": "http://127.0.0.1:9/canary-token", "is no address": "canary-token"}[fault]
        monkeypatch.setenv(notify.WEBHOOK, address)
        assert notify.post("champion", "a new champion") is False
    stderr = capsys.readouterr().err
    assert stderr.count("tracking:") == 1 and "did not take `champion`" in stderr and "canary" not in stderr


def test_without_a_webhook_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(notify.WEBHOOK, raising=False)
    assert notify.post("champion", "a new champion") is False
    assert capsys.readouterr().err == ""
