"""Pipeline as a Prefect flow: DVC's stages, in the order of DVC's own graph, one task each.

    python -m flows.pipeline [--parallel N] [--recipe NAME]

DVC decides what is stale, so Prefect caches nothing; a stage that exits with 75 is retried, one that exits with 2 is not. The
flow ends with a gate: a plain `dvc repro` has nothing to do.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar
from uuid import UUID

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.tasks import Task
from pydantic import Field

from components.config import recipes
from components.config.load import load_settings
from components.errors import AlignTIError, InputError, TryAgainError
from components.process import exit_from, terminate_once_with_parent
from components.tracking import history, provenance
from components.tracking.stage_run import PARENT, stage_run
from flows import devices, dvc, dvc_repro, heartbeat, jobs, notify, plan, prefect_artifacts, promote, servers
from flows.dvc_repro import Outcome, StopWhen
from flows.stage_log import StageLog
from flows.workspace import workspace

RETRIES = 2
RETRY_DELAY_S = 30


def is_retryable(_task: Task, _run: TaskRun, state: State) -> bool:
    """Retry condition, exit code 75 only: a wrong input stays wrong, and an interrupted stage was stopped on purpose."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, AlignTIError) and error.exit_code == TryAgainError.exit_code


P = ParamSpec("P")
R = TypeVar("R")


def retrying_task(name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Prefect task named `name`, with retries and without caching."""
    return task(
        task_run_name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=RETRIES,
        retry_delay_seconds=RETRY_DELAY_S,
        retry_condition_fn=is_retryable,
    )


@retrying_task("{stage}")
def run_stage(
    stage: str, parent: str, slots: threading.Semaphore, stop_when: StopWhen | None = None, stale: bool = True
) -> Outcome:
    if not stale:
        return "unchanged"
    with slots, devices.lock_gpu() as device:
        return dvc_repro.reproduce(stage, {PARENT: parent, **device}, stop_when, on_line=StageLog(stage))


UNLIMITED = threading.Semaphore(2**20)  # unlimited slots: no need to wait, or the caller holds one


def choice_field(names: list[str]) -> Any:
    """Field with an enum for Prefect's form, which its server enforces; any value if `names` is empty."""
    schema: Any = {"enum": names}
    return Field(json_schema_extra=schema if names else None)


def committed_recipes() -> list[str]:
    """Recipes that a workspace will have: those of HEAD, if git reads this folder."""
    files = provenance.git("ls-tree", "--name-only", "HEAD", "params/recipes/")
    if files is None:
        return recipes.names()
    stems = {Path(file).stem for file in files.splitlines()}
    return [name for name in recipes.names() if name.partition("/")[0] in stems]


RecipeName = Annotated[str, choice_field(committed_recipes())] | None


def run_stages(title: str, graph: Mapping[str, list[str]], parent: str, slots: threading.Semaphore) -> dict[str, Outcome]:
    """Run the stages of `graph` in its order; returns the outcome per stage. `title`: their title on the run's page.

    Raises StageFailed of the first failure; stages that do not need the failed one were still run.
    """
    futures: dict[str, PrefectFuture[Outcome]] = {}
    reasons = plan.reasons_to_run(graph, dvc.status())  # one look for all, instead of a `dvc repro` for each that is up to date
    for stage, needs in graph.items():
        upstream = [futures[upstream_stage] for upstream_stage in needs]
        futures[stage] = run_stage.submit(
            stage, parent, slots, stale=bool(reasons[stage]), wait_for=upstream, return_state=False
        )
    wait_for(title, futures)
    return {stage: future.result() for stage, future in futures.items()}


def run_name() -> str:
    """Name of a flow run, with a part of its id: also the name of a folder and a branch."""
    parameters = flow_run.parameters
    words = [
        parameters.get("name") or flow_run.flow_name.removeprefix("alignti-"),
        parameters.get("recipe"),
        str(flow_run.id)[:8],
    ]
    return "-".join(word.replace("/", "-") for word in words if word)


@flow(name="alignti-pipeline", flow_run_name=run_name, on_failure=[notify.failed], on_crashed=[notify.failed])
def pipeline(
    parallel: Annotated[int, Field(ge=1, le=64)] = 1,
    recipe: RecipeName = None,
    targets: list[str] | None = None,
    own_workspace: bool = False,
) -> dict[str, Outcome]:
    """Bring every stage up to date; returns what became of each.

    Args:
        parallel: stages at a time, where the graph allows.
        recipe: params/recipes/NAME.yaml, merged into params/ first.
        targets: stages to bring up to date, and what they need; none: all.
        own_workspace: run what is committed, in a worktree; else in the folder as it is.

    Raises:
        StageFailed: of the first stage that failed; stages that do not need it were still run.
        AlignTIError: the gate found something left to do.
    """
    end_with_worker()
    if recipe and not own_workspace:
        raise InputError(f"a recipe overwrites params/: `alignti use {recipe}` does that here; own_workspace runs it elsewhere")
    with folder(own_workspace, recipe):
        tag(recipe or recipes.nearest()[0])
        runtime = load_settings().runtime
        slots = threading.Semaphore(parallel)
        with prefect_artifacts.linked(runtime, stage_run("pipeline", runtime=runtime, metered=False)) as run:
            outcomes = run_stages("stages", dvc.graph(targets or ()), run.id, slots)
            locked = provenance.locked()
            for stage, outcome in outcomes.items():
                run.tag(f"stage.{stage}", outcome)
                for path, md5 in list(locked.get(stage, {}).items())[:1]:  # the run that made it, now or earlier
                    run.link(f"stage.{stage}.run", provenance.maker(md5), path, md5)
            last_runs = [history.last(stage) for stage, outcome in outcomes.items() if outcome == "ran"]
            run.metrics({"usage/stage_hours": sum(last.seconds for last in last_runs if last) / 3600})
            gate(targets or ())
            if "compare" in outcomes:
                promote.register_all()
            prefect_artifacts.leaderboard()
    return outcomes


def end_with_worker() -> None:
    """End this flow run with the worker that started it, even if that is killed: its slot of the pool is free then.

    If both are killed, `alignti doctor` finds the run.
    """
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        heartbeat.outlive_output()
        terminate_once_with_parent()
    heartbeat.announce(str(flow_run.id))
    servers.end_temporary_prefect()


def tag(*names: str | None) -> None:
    """Tag this flow run with its recipe and study, for the filter of Prefect's pages."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(flow_run.id), tags=sorted({*flow_run.tags, *filter(None, names)}))


@contextmanager
def folder(isolated: bool, recipe: str | None = None, commit: str = "HEAD") -> Iterator[None]:
    """Current folder as it is, or a new workspace of this flow run with `recipe` merged into its params."""
    if not isolated:
        jobs.check_idle()
        yield
        return
    with workspace(flow_run.name or str(flow_run.id), commit) as path:
        print(f"workspace {path}: what is committed, {path.parent.parent.parent} as it lies is not touched")
        if recipe:
            print(recipes.use(recipe))
        yield


def wait_for(title: str, futures: Mapping[str, PrefectFuture[Any]]) -> None:
    """Wait for all futures and show progress. If the flow run is cancelled or its worker dies, its stages are stopped."""
    try:
        prefect_artifacts.follow(title, futures)
    except BaseException:
        dvc_repro.stop_all()
        raise


def gate(targets: Sequence[str] = ()) -> None:
    """Raises AlignTIError unless a fresh `dvc repro` has nothing to do."""
    outcome, changes = dvc_repro.reproduce_all(targets), {} if targets else dvc.status()
    if outcome != "unchanged" or changes:
        raise AlignTIError(f"`dvc repro` after the flow should have nothing to do, but stages {outcome}; status: {changes}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the pipeline through Prefect.")
    parser.add_argument("--parallel", type=int, default=1, help="stages at a time")
    parser.add_argument("--recipe", help="run the committed code on this recipe, in a workspace of its own")
    args = parser.parse_args()
    if not 1 <= args.parallel <= 64:
        raise InputError(f"--parallel {args.parallel}: how many stages at a time, 1 to 64")
    if args.recipe is None:
        jobs.check_idle()  # before a server is started
    with servers.prefect_failures():
        outcomes = pipeline(parallel=args.parallel, recipe=args.recipe, own_workspace=args.recipe is not None)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in Counter(outcomes.values()).items())
    print(f"{len(outcomes)} stages: {summary}; `dvc repro` has nothing left to do.")


if __name__ == "__main__":
    exit_from(main)
