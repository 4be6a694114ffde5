"""A tracking server that refuses, answers 500, hangs, or cuts the connection before or after it has handled the request.

A stage's run goes through a proxy that does one of these to most requests. The stage has to end in time; afterwards
`alignti sync` with the server itself has to bring the rest: one run, every point once.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from components.process import end_with_parent

ROOT = Path(__file__).parents[2]
STEPS, LONGEST_S, STUCK_S = 20, 90, 900
BEHAVIOURS = ("pass", "refuse", "500", "hang", "cut before", "cut after", "half an answer")

STAGE = """
import sys, time
from pathlib import Path
from components.config.load import load_settings
from components.tracking.stage_run import stage_run
runtime = load_settings(Path(ROOT)).runtime.model_copy(update={"tracking_uri": sys.argv[1]})
began = time.monotonic()
with stage_run("distill", cell="kd", runtime=runtime, params={"seed": 1}, metered=False) as run:
    for step in range(STEPS):
        run.metrics({"loss/kd": float(step)}, step)
        time.sleep(0.2)
    run.tag("note", "whole")
print(time.monotonic() - began)
"""
SYNC = "import sys; from components.tracking import mlflow_sync; print(*mlflow_sync.sync(sys.argv[1]))"


@contextlib.contextmanager
def mlflow(folder: Path) -> Iterator[str]:
    """A real server, of its own database."""
    args = ["mlflow", "server", "--host", "127.0.0.1", "--workers", "1", "--backend-store-uri", "sqlite:///m.db"]
    with serving(args, folder, "/health", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}) as (
        address,
        _,
    ):  # 8 processes fewer
        yield address


@contextlib.contextmanager
def serving(
    args: list[str], folder: Path, health: str, environment: dict[str, str], port: int | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`python -m ARGS --port ...`, once it answers; its address and process."""
    folder.mkdir(exist_ok=True)
    port = port or 20000 + random.SystemRandom().randrange(10000)
    command = [sys.executable, "-m", *args, "--port", str(port)]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, stdout=log, stderr=log, preexec_fn=end_with_parent
        )
    try:
        until = time.monotonic() + 300
        while not _healthy(port, health):
            assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-2000:]
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait()


def tracker(address: str, seed: str, cwd: Path) -> tuple[str, str | None]:
    rng = random.Random(seed)
    cwd.mkdir()
    weights = [rng.random() for _ in BEHAVIOURS]
    did = ", ".join(f"{name} {weight / sum(weights):.0%}" for name, weight in zip(BEHAVIOURS, weights, strict=True))
    with proxy(address, rng, weights) as proxy_address:
        stage = _python(STAGE.replace("ROOT", repr(str(ROOT))).replace("STEPS", str(STEPS)), proxy_address, cwd)
    if stage.returncode or "Traceback" in stage.stderr:
        return did, f"the stage exits with {stage.returncode}: {stage.stderr[-500:]}"
    if (seconds := float(stage.stdout)) > LONGEST_S:  # without its imports, which load makes slow
        return did, f"the stage took {seconds:.0f} s"
    sync = _python(SYNC, address, cwd)
    if sync.returncode:
        return did, f"sync afterwards exits with {sync.returncode}: {sync.stderr[-500:]}"
    (journal,) = (cwd / ".runs/journal").glob("*.jsonl")
    query = {"experiment_ids": _experiments(address), "filter": f"tags.`alignti.run` = '{journal.stem}'"}
    response = _call_api(address, "runs/search", query)
    runs = response.get("runs", [])
    if len(runs) != 1:
        return did, f"{len(runs)} runs of one journal"
    info = runs[0]["info"]
    history = _call_api(address, f"metrics/get-history?run_id={info['run_id']}&metric_key=loss/kd", None).get("metrics", [])
    points = sorted((point["step"], point["value"]) for point in history)
    expected = [(step, float(step)) for step in range(STEPS)]
    if points != expected or info["status"] != "FINISHED":
        return did, f"{info['status']}, {len(points)} points of {STEPS}, {len(set(points))} of them different"
    return did, None


@contextlib.contextmanager
def proxy(address: str, rng: random.Random, weights: list[float], for_s: float = math.inf) -> Iterator[str]:
    """The address of a proxy that treats each request by a random behaviour, for `for_s` seconds."""
    choose, until = threading.Lock(), time.monotonic() + for_s
    host, port = address.removeprefix("http://").split(":")

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            with choose:
                (behaviour,) = rng.choices(BEHAVIOURS, weights) if time.monotonic() < until else ["pass"]
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if behaviour == "hang":
                time.sleep(7)
            if behaviour == "500":
                self.send_error(500)
            elif behaviour not in ("refuse", "cut before", "hang"):
                self._forward(content, behaviour)

        def _forward(self, content: bytes, behaviour: str) -> None:
            forward = http.client.HTTPConnection(host, int(port), timeout=60)
            headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
            forward.request(self.command, self.path, content, {**headers, "Connection": "close"})
            answer = forward.getresponse()
            body = answer.read()
            if behaviour == "cut after":
                return
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.getheader("Content-Type") or "")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if behaviour == "half an answer" else body)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _answer  # noqa: N815

        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):  # it was cut off on purpose
                super().handle()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()


def _python(code: str, address: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    return subprocess.run(
        [sys.executable, "-c", code, address], cwd=cwd, env=environment, capture_output=True, text=True, timeout=STUCK_S
    )


def _healthy(port: int, page: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", page)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _experiments(address: str) -> list[str]:
    response = _call_api(address, "experiments/search", {"max_results": 100})
    return [experiment["experiment_id"] for experiment in response.get("experiments", [])]


def _call_api(address: str, path: str, content: Any) -> Any:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    method, body = ("GET", None) if content is None else ("POST", json.dumps(content))
    connection.request(method, f"/api/2.0/mlflow/{path}", body, {"Content-Type": "application/json"})
    return json.loads(connection.getresponse().read())
