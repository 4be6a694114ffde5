"""`alignti worker` looks after its workers; here they are processes that wait. And prefect.yaml says what flows take."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from components.errors import AlignTIError, InputError, TryAgainError
from flows import cleanup_stale_runs, devices, heartbeat, pool, remote_arms, servers
from flows.nightly import nightly
from flows.pipeline import committed_recipes, pipeline
from flows.remote_arms import stages
from flows.study import study

ROOT = Path(__file__).parents[2]
Workers = list[subprocess.Popen[bytes]]
FLOWS: dict[str, Any] = {
    "flows.pipeline.pipeline": pipeline,
    "flows.study.study": study,
    "flows.nightly.nightly": nightly,
    "flows.remote_arms.stages": stages,
}
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """Workers started so far."""
    started: Workers = []

    def start(pool: str, title: str, limit: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True, env=environment
        )
        started.append(process)
        return process

    monkeypatch.setattr(pool, "_start", start)
    monkeypatch.setattr(servers, "client_environment", dict)
    return started


def test_a_worker_per_gpu_and_if_one_ends_all_do(waiting: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(devices.VISIBLE, "0,1,2")

    def kill_one() -> None:
        while len(waiting) < 4:
            time.sleep(0.01)
        waiting[1].kill()

    threading.Thread(target=kill_one).start()
    with pytest.raises(AlignTIError, match="a worker ended with exit code -9"):
        pool.work(echo=lambda _: None)
    assert len(waiting) == 4  # and one for studies
    assert all(process.poll() is not None for process in waiting)


def test_down_stops_the_workers_of_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pool.stop_workers() == 0
    code = "import os, time; from flows import heartbeat as h; h.announce(str(os.getpid()), h.WORKERS); time.sleep(600)"
    worker = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    while heartbeat.workers() != [worker.pid]:
        time.sleep(0.02)
    ended = threading.Thread(target=worker.wait)
    ended.start()
    assert pool.stop_workers() == 1 and heartbeat.workers() == []
    ended.join()
    assert worker.returncode == -signal.SIGTERM


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["name"])
def test_a_deployment_names_a_flow_its_parameters_and_a_queue(deployment: dict[str, Any]) -> None:
    flow: Any = FLOWS[deployment["entrypoint"]]
    if flow is not stages:  # a study says what
        flow.validate_parameters(deployment["parameters"])
    assert set(deployment["parameters"]) <= set(inspect.signature(flow.fn).parameters)
    assert deployment["work_pool"]["work_queue_name"] in pool.QUEUES
    if flow is pipeline:
        assert deployment["parameters"]["own_workspace"]  # a schedule never touches what somebody is editing


def test_the_form_of_a_deployment_explains_every_parameter() -> None:
    for flow in FLOWS.values():
        for parameter in flow.parameters.properties.values():
            assert len(parameter["description"]) > 15
    assert {"smoke", "digits"} <= set(pipeline.parameters.properties["recipe"]["anyOf"][0]["enum"])  # menus refuse typos
    assert "terms" in study.parameters.properties["name"]["enum"]


def test_the_menu_has_the_recipes_that_a_workspace_will_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "smoke"):
        path = tmp_path / f"params/recipes/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("about: {}\n")
    assert committed_recipes() == ["mine", "smoke"], "no repository"
    for command in (["init", "-q"], ["add", "params/recipes/smoke.yaml"], ["commit", "-qm", "smoke alone"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *command], check=True)
    assert committed_recipes() == ["smoke"]


class Faulty(BaseHTTPRequestHandler):
    status = 500

    def _answer(self) -> None:
        self.send_error(self.status)

    do_GET = do_POST = do_PATCH = _answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.mark.parametrize(("status", "error"), [(500, TryAgainError), (401, InputError), (None, TryAgainError)])
@pytest.mark.parametrize("call", [cleanup_stale_runs.leaks, partial(pool._create_pool, "cpu", 1)], ids=["doctor", "deploy"])
def test_a_server_that_refuses_or_fails_is_named(
    call: Callable[[], object], status: int | None, error: type[AlignTIError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Faulty, "status", status)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/api"
    monkeypatch.setenv("PREFECT_API_URL", address)
    if status is None:
        server.server_close()
    with temporary_settings({PREFECT_API_URL: address, PREFECT_CLIENT_MAX_RETRIES: 0}), pytest.raises(error, match=address):
        call()
    server.shutdown()


def test_an_order_that_a_busy_server_does_not_take_is_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    request = httpx.Request("POST", "http://127.0.0.1:4200/api/task_runs/")
    busy = PrefectHTTPStatusError("Server error '503'\nsee", request=request, response=httpx.Response(503, request=request))

    def living(*_: object) -> None:
        raise busy

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr(remote_arms, "_unfinished_run", living)
    with pytest.raises(TryAgainError, match=r"does not answer: Server error '503'$"):
        remote_arms.RemoteStages("smoke", "0" * 40, None, "run")._run_remotely("tpa0", [])


def test_schedules_that_prefect_yaml_no_longer_has_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prefect.yaml").write_text("deployments: [{name: night, schedules: [{cron: 0 2 * * *}]}, {name: weekly}]\n")

    def deployed(name: str, active: bool = True, entrypoint: str = "flows.nightly.nightly") -> SimpleNamespace:
        return SimpleNamespace(name=name, flow_id=1, entrypoint=entrypoint, schedules=[SimpleNamespace(active=active)])

    cases = [deployed("night"), deployed("nightly"), deployed("weekly"), deployed("old", False), deployed("x", True, "x.py:x")]
    client = SimpleNamespace(read_flows=lambda: [SimpleNamespace(id=1, name="f")], read_deployments=lambda: cases)
    monkeypatch.setattr(servers, "prefect_client", lambda: contextlib.nullcontext(client))
    assert pool._still_scheduled() == ["f/nightly", "f/weekly"]
