"""The pipeline as a Prefect flow: DVC's stages, in the order of DVC's own graph, one task each.

    python -m flows.pipeline [--parallel N]

What is stale is DVC's to say, so Prefect caches nothing; it retries a stage that exits with 75 and none that exits with 2.
It ends with a gate: a plain `dvc repro` finds nothing to do.
"""

from __future__ import annotations

import argparse
import threading
from collections import Counter

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture, wait
from prefect.tasks import Task

from components import tracking
from components.errors import AlignTIError, TryAgainError, exit_from
from components.settings import load_settings
from flows import dvc

RETRIES = 2
RETRY_DELAY_S = 30


def worth_another_try(_task: Task, _run: TaskRun, state: State) -> bool:
    """Exit code 75 only: a wrong input stays wrong, and an interrupted stage was stopped on purpose."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, AlignTIError) and error.exit_code == TryAgainError.exit_code


@task(
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=worth_another_try,
)
def run_stage(stage: str, parent: str, slots: threading.Semaphore) -> dvc.Outcome:
    with slots:
        return dvc.reproduce(stage, {tracking.PARENT: parent})


@flow(name="alignti-pipeline")
def pipeline(parallel: int = 1) -> dict[str, dvc.Outcome]:
    """Bring every stage up to date, `parallel` at a time where the graph allows; returns what became of each.

    Raises:
        dvc.StageFailed: of the first stage that failed; stages that do not need it were still run.
        AlignTIError: the gate found something left to do.
    """
    runtime = load_settings().runtime
    slots = threading.Semaphore(parallel)
    with tracking.stage_run("pipeline", runtime=runtime) as run:
        futures: dict[str, PrefectFuture[dvc.Outcome]] = {}
        for stage, needs in dvc.graph().items():
            upstream = [futures[before] for before in needs]
            futures[stage] = run_stage.submit(stage, run.id, slots, wait_for=upstream, return_state=False)
        wait(list(futures.values()))
        outcomes = {stage: future.result() for stage, future in futures.items()}
        for stage, outcome in outcomes.items():
            run.tag(f"stage.{stage}", outcome)
        gate()
    return outcomes


def gate() -> None:
    """Raises AlignTIError unless DVC, asked afresh, has nothing to do."""
    outcome, left = dvc.reproduce_all(), dvc.status()
    if outcome != "unchanged" or left:
        raise AlignTIError(f"`dvc repro` after the flow should have nothing to do, but stages {outcome}; status: {left}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the pipeline through Prefect.")
    parser.add_argument("--parallel", type=int, default=1, help="stages at a time")
    outcomes = pipeline(parallel=parser.parse_args().parallel)
    told = ", ".join(f"{count} {outcome}" for outcome, count in Counter(outcomes.values()).items())
    print(f"{len(outcomes)} stages: {told}; `dvc repro` has nothing left to do.")


if __name__ == "__main__":
    exit_from(main)
