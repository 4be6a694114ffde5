"""Clean-up after dead flow runs: `alignti doctor` lists, `alignti doctor --free-slots` frees.

Prefect counts a `Running` run against its pool, queue and deployment, whether its process is alive or not. And a restarted
server has lost the holders of the slots that its database still counts as taken.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from flows import heartbeat, servers, workspace

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

DEPLOYMENT = "deployment:"  # Prefect's prefix of a deployment's limit
PENDING = timedelta(minutes=10)  # a worker that takes a run starts its process at once


@dataclass(frozen=True)
class Leak:
    """Leaked resource: `what` describes it, `free` releases it."""

    what: str
    free: Callable[[], object]


def leaks() -> list[Leak]:
    """Leaked resources on this machine and on the server that is up (or that of PREFECT_API_URL).

    Raises TryAgainError if that server does not answer.
    """
    worktrees = (f"worktree .runs/workspaces/{name} of a run that died" for name in workspace.dead_workspaces())
    return [*(_server_leaks() if reachable() else ()), *(Leak(description, workspace.sweep) for description in worktrees)]


def free() -> Iterator[str]:
    """Release all leaked resources; yields a description of each."""
    for leak in leaks():
        leak.free()
        yield leak.what
    if reachable():
        for run in heartbeat.dead_runs():  # runs whose end their workers reported
            heartbeat.forget(run)


def reachable() -> bool:
    """Whether a Prefect server is up here or named by PREFECT_API_URL."""
    servers.use_running()
    return "PREFECT_API_URL" in os.environ


def _server_leaks() -> Iterator[Leak]:
    with servers.prefect_client() as client:
        before, limits, after = _holders(client), client.read_global_concurrency_limits(limit=200), _holders(client)
        for run in filter(_is_dead, after):
            assert run.state is not None
            queue = f" of pool {run.work_pool_name}, queue {run.work_queue_name}" if run.work_pool_name else ""
            description = f"flow run {run.name} says {run.state.name}, but its process is gone: its slot{queue}"
            yield Leak(description, partial(_crash, run))
        holders = {run.id: run for run in [*before, *after]}.values()  # with runs that began or ended between the two
        per_deployment = Counter(f"{DEPLOYMENT}{run.deployment_id}" for run in holders)
        for limit in limits:
            of_deployment = limit.name.startswith(DEPLOYMENT)
            surplus = limit.active_slots - (per_deployment[limit.name] if of_deployment else len(holders))
            if surplus > 0 and (of_deployment or not holders):  # which runs hold another limit's slots is not known
                deployment = limit.name.removeprefix(DEPLOYMENT)
                owner = f"deployment {client.read_deployment(deployment).name}" if of_deployment else limit.name
                yield Leak(f"{surplus} slot(s) of {owner} that no run holds", partial(_release, limit.name, surplus))


def _holders(client: SyncPrefectClient) -> list[FlowRun]:
    """All runs that the server counts as holders of slots."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    states = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    run_filter = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)))
    runs: list[FlowRun] = []
    while page := client.read_flow_runs(flow_run_filter=run_filter, limit=200, offset=len(runs)):
        runs += page
    return runs


def _is_dead(run: FlowRun) -> bool:
    """Whether the run's process on this machine is dead, or never started."""
    if str(run.id) in heartbeat.dead_runs():
        return True
    assert run.state is not None
    return run.state.is_pending() and datetime.now(UTC) - run.state.timestamp > PENDING


def _crash(run: FlowRun) -> None:
    from prefect.client.schemas.objects import State
    from prefect.states import Crashed

    with servers.prefect_client() as client:
        state: State[None] = Crashed(message="Its process died without a word; `alignti doctor` ended the run.")
        client.set_flow_run_state(run.id, state, force=True)
    heartbeat.forget(str(run.id))


def _release(limit: str, slots: int) -> None:
    with servers.prefect_client() as client:
        client.release_concurrency_slots([limit], slots, occupancy_seconds=1)
