"""Remote arms: stages of a study as separate flow runs, for any worker of the pool.

The study submits them and restores their outputs: from the cache, if the machines share it, or else through a DVC remote named
`pool`, to which each workspace pushes (flows/workspace.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.states import Cancelling

from components.errors import AlignTIError, InputError, Interrupted, TryAgainError
from components.study import expand
from flows import dvc, dvc_repro, servers
from flows.dvc_repro import Outcome
from flows.early_stopping import diverged
from flows.pipeline import UNLIMITED, end_with_worker, folder, run_stage

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

DEPLOYMENT = "alignti-stages/of-study"
POLL_S = 2


class NotMade(AlignTIError):
    """Failed flow run of the pool; `seconds` is its run time. If its worker died, it is worth a retry."""

    def __init__(self, run: FlowRun) -> None:
        assert run.state is not None
        super().__init__(f"flow run {run.name} is {run.state.name}: {run.state.message or 'it does not say why'}")
        if run.state.is_crashed():
            self.exit_code = TryAgainError.exit_code
        self.seconds = run.total_run_time.total_seconds()


@flow(name="alignti-stages")
def stages(study: str, targets: list[str], commit: str, recipe: str | None = None, parent: str = "") -> dict[str, Outcome]:
    """Bring some stages of a study, and what they need, up to date in a workspace; a study orders this of the pool.

    Args:
        study: params/studies/NAME.yaml.
        targets: stages, as DVC names them.
        commit: the code and params to run; fetched if this clone does not have it.
        recipe: params/recipes/NAME.yaml, merged into params/ first.
        parent: the tracked run that this is part of.

    Raises:
        StageFailed: of the first stage that failed.
    """
    end_with_worker()
    with folder(isolated=True, recipe=recipe, commit=commit):
        expand.expand(study)
        diverged_above = expand.read(study).diverged_above
        outcomes: dict[str, Outcome] = {}
        for stage in dvc.graph(targets):
            dvc.restore(stage)
            kind, _, arm = stage.partition("@")
            stop_when = diverged(arm, diverged_above) if kind == "distill" else None
            outcomes[stage] = run_stage(stage, parent, UNLIMITED, stop_when)
    return outcomes


@dataclass(frozen=True)
class RemoteStages:
    """Common parameters of the flow runs that one run of a study submits."""

    study: str
    commit: str
    recipe: str | None
    parent: str

    def restore_or_run(self, title: str, targets: Sequence[str], record: Callable[[str], Outcome]) -> bool:
        """Restore and `record` each target in order; missing ones are run by the pool first. True if the pool ran any.

        Raises:
            NotMade: the pool's flow run failed, with its message.
            AlignTIError: its outputs did not get here.
        """
        missing = _restore_available(targets, record)
        if missing:
            self._run_remotely(title, missing)
            if absent := _restore_available(missing, record):
                raise AlignTIError(
                    f"{absent[0]} was made by the pool, but it is not in DVC's cache here: let the machines share a cache"
                    " (`dvc cache dir --local`) or give each a remote called `pool` (docs/orchestration.md)"
                )
        return bool(missing)

    def _run_remotely(self, title: str, targets: Sequence[str]) -> None:
        parameters = {"study": self.study, "targets": list(targets), "commit": self.commit, "recipe": self.recipe}
        with servers.prefect_client() as client:
            if run := _unfinished_run(client, self._tag(title), parameters):
                line = f"{title}: flow run {run.name}, which was ordered before, has not ended; waiting for it\n"
                print(line, end="", flush=True)  # whole, beside those of other arms
            run = _wait_until_final(client, run or self._submit(title, parameters))
        assert run.state is not None
        if not run.state.is_completed():
            raise NotMade(run)

    def _submit(self, title: str, parameters: dict[str, Any]) -> FlowRun:
        try:
            return run_deployment(  # type: ignore[return-value]  # it is no coroutine outside an event loop
                DEPLOYMENT,
                parameters={**parameters, "parent": self.parent},
                flow_run_name=f"{self.study}-{title}-{int(time.time())}",
                tags=[self._tag(title)],
                timeout=0,
            )
        except ObjectNotFound:
            raise InputError(f"there is no deployment {DEPLOYMENT} on the server: `alignti deploy` makes it") from None

    def _tag(self, title: str) -> str:
        return f"{self.study}/{title}"


def _restore_available(targets: Sequence[str], record: Callable[[str], Outcome]) -> Sequence[str]:
    """Restore targets in order, up to the first that is in no cache; returns that one and the rest."""
    for position, target in enumerate(targets):
        if not dvc.restore(target):
            return targets[position:]
        record(target)
    return []


def _unfinished_run(client: SyncPrefectClient, tag: str, parameters: dict[str, Any]) -> FlowRun | None:
    """Unfinished flow run with the same parameters, submitted by a study that died; None if there is none."""
    states = [state for state in StateType if state not in TERMINAL_STATES]
    run_filter = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[tag]), state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))
    )
    runs = client.read_flow_runs(flow_run_filter=run_filter)
    return next((run for run in runs if parameters.items() <= run.parameters.items()), None)


def _wait_until_final(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """Wait for the flow run; cancel it if this process is stopped. Raises Interrupted."""
    try:
        while run.state is None or not run.state.is_final():
            if dvc_repro.wait_for_stop(POLL_S):
                raise Interrupted(f"flow run {run.name} is cancelled with the study that ordered it")
            run = client.read_flow_run(run.id)
    except (Interrupted, TerminationSignal, KeyboardInterrupt):
        client.set_flow_run_state(run.id, Cancelling())
        raise
    return run
