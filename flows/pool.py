"""Pool of workers: `alignti deploy` registers deployments with Prefect, `alignti worker` runs them.

Two work pools of processes, `cpu` and `gpu`, with one run at a time per device and three queues by priority: `urgent`,
`default`, `background`. A third, `studies`, is for flow runs that submit work to the others and wait: on a device they would
keep it idle, and with one worker they would deadlock.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import yaml

from components.errors import AlignTIError
from components.process import end_with_parent
from flows import cleanup_stale_runs, devices, heartbeat, servers

QUEUES = {"urgent": 1, "default": 10, "background": 20}  # priority; the lowest number goes first
ROOT = "ALIGNTI_ROOT"  # the clone of a worker; each machine of a pool has one
POLL_S = "5"  # seconds between a worker's polls
GRACE_S = 30  # between SIGTERM and SIGKILL of workers: a training saves meanwhile
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]


STUDIES = "studies"
MAX_STUDIES = 8  # studies at a time, which only wait for their arms


def name() -> str:
    """Pool of this machine."""
    return "gpu" if devices.gpus() else "cpu"


def deploy(at_once: int | None = None) -> Iterator[str]:
    """Register pools and deployments (idempotent); yields a line each. Raises InputError if no server is up, or AlignTIError.

    `at_once`: concurrency limit of this machine's pool, if it is not alone in it; else the number of its devices.
    """
    os.environ |= servers.client_environment() | {"ALIGNTI_POOL": name()}
    limits = {"cpu": 1, "gpu": max(len(devices.gpus()), 1), STUDIES: MAX_STUDIES}
    if at_once:
        limits[name()] = at_once
    for pool, limit in limits.items():
        _create_pool(pool, limit)
        yield f"pool {pool}: {limit} flow run(s) at a time; queues {', '.join(QUEUES)}"
    result = subprocess.run([*PREFECT, "deploy", "--all"], capture_output=True, text=True)
    if result.returncode:
        raise AlignTIError(f"`prefect deploy` failed:\n{(result.stdout + result.stderr)[-3000:].strip()}")
    page = os.environ["PREFECT_API_URL"].removesuffix("/api")
    yield f"deployments of prefect.yaml, on pool {name()}; start them at {page}/deployments"
    for title in _still_scheduled():
        yield (
            f"{title} has a schedule on the server and none in prefect.yaml, and still runs: `prefect deployment schedule clear"
            f" {title}` ends that (PREFECT_API_URL={page}/api)"
        )


def _still_scheduled() -> list[str]:
    """Deployments of this project that were renamed or lost their schedule in prefect.yaml: `prefect deploy` leaves the old."""
    declared = yaml.safe_load(Path("prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    scheduled = {entry["name"] for entry in declared if entry.get("schedules")}
    with servers.prefect_client() as client:
        flow_names = {flow.id: flow.name for flow in client.read_flows()}
        return sorted(
            f"{flow_names[deployment.flow_id]}/{deployment.name}"
            for deployment in client.read_deployments()
            if (deployment.entrypoint or "").startswith("flows.")
            and deployment.name not in scheduled
            and any(schedule.active for schedule in deployment.schedules)
        )


def work(count: int | None = None, echo: Callable[[str], None] = print) -> None:
    """Run `count` workers (else one per GPU, else one) and one for studies, until one ends or this is stopped; then stop all.

    Raises:
        AlignTIError: a worker ended by itself.
    """
    heartbeat.announce(str(os.getpid()), heartbeat.WORKERS)
    environment = os.environ | servers.client_environment() | {"PREFECT_WORKER_QUERY_SECONDS": POLL_S, ROOT: str(Path.cwd())}
    for leak in cleanup_stale_runs.free():  # left by a crash of this machine
        echo(f"freed: {leak}")
    gpus = devices.gpus()
    visible: list[dict[str, str]] = [{devices.VISIBLE: gpu} for gpu in gpus[:count]] or [{}] * (count or 1)
    workers = [_start(name(), gpu.get(devices.VISIBLE, str(i)), 1, environment | gpu) for i, gpu in enumerate(visible)]
    echo(f"{len(workers)} worker(s) on pool {name()}, and one for studies; Ctrl-C stops them")
    workers.append(_start(STUDIES, platform.node(), MAX_STUDIES, environment))
    try:
        while all(worker.poll() is None for worker in workers):
            time.sleep(1)
        dead = next(worker for worker in workers if worker.poll() is not None)
        raise AlignTIError(f"a worker ended with exit code {dead.returncode}; what it said is above. The others are stopped.")
    finally:
        _stop(workers)


def stop_workers() -> int:
    """Stop this folder's `alignti worker` processes and their runs, and wait; returns how many there were."""
    pids = heartbeat.workers()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 2 * GRACE_S
    while alive := [pid for pid in heartbeat.workers() if pid in pids]:
        if time.monotonic() > deadline:
            raise AlignTIError(f"process(es) {', '.join(map(str, alive))} of `alignti worker` do not end")
        time.sleep(0.1)
    return len(pids)


def _create_pool(pool: str, limit: int) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists

    with servers.prefect_client() as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=pool, type="process", concurrency_limit=limit))
        except ObjectAlreadyExists:
            client.update_work_pool(pool, WorkPoolUpdate(concurrency_limit=limit))
        for queue, priority in QUEUES.items():
            try:
                client.create_work_queue(queue, priority=priority, work_pool_name=pool)
            except ObjectAlreadyExists:
                client.update_work_queue(client.read_work_queue_by_name(queue, pool).id, priority=priority)


def _start(pool: str, title: str, limit: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [*PREFECT, "worker", "start", "--pool", pool, "--name", f"{pool}-{title}", "--limit", str(limit)]
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_before_worker)


def _before_worker() -> None:
    """Restore SIGINT, which stops Prefect's worker: background jobs of a shell, as in a batch script, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()


def _stop(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for worker in workers:
        try:
            worker.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
