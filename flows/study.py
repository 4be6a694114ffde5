"""A study as a Prefect flow: its arms become DVC's stages, are trained and scored, recorded, and compared.

    alignti study run NAME [--parallel N] [--recipe NAME]

It runs in a workspace of its own. An arm that fails leaves the others; run again, only what is missing is run, the rest is
restored from DVC's cache.
"""

from __future__ import annotations

import threading
import time
from typing import Annotated, get_args

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from pydantic import Field

from components import mirror, recipes, tracking
from components.artifacts import STUDENTS, Cost
from components.errors import AlignTIError
from components.settings import RuntimeSettings, load_settings
from components.study import expand, record
from components.study.expand import Cell, Study
from flows import dvc, notify
from flows.divergence import diverged
from flows.pipeline import RETRIES, RETRY_DELAY_S, end_with_worker, folder, gate, run_stage, worth_another_try

CLOSING = "compare"  # the stage over all arms: run when none is missing
DONE = get_args(dvc.Outcome)


class BudgetSpent(AlignTIError):
    """The study's device hours do not allow another arm."""


class Budget:
    """Device seconds that the study's arms have taken, whenever they ran."""

    def __init__(self, hours: float | None) -> None:
        self._seconds = None if hours is None else 3600 * hours
        self._spent: dict[str, float] = {}
        self._reserved: dict[str, float] = {}
        self._lock = threading.Lock()

    def reserve(self, arm: str) -> None:
        """Raises BudgetSpent if an arm like those before would pass the cap."""
        with self._lock:
            expected = sum(self._spent.values()) / len(self._spent) if self._spent else 0.0
            total = sum(self._spent.values()) + sum(self._reserved.values())
            if self._seconds is not None and total + expected > self._seconds:
                raise BudgetSpent(f"{arm} is not run: {total / 3600:.2f} of {self._seconds / 3600:g} device hours are spent")
            self._reserved[arm] = expected

    def spend(self, arm: str, seconds: float) -> None:
        with self._lock:
            self._reserved.pop(arm, None)
            self._spent[arm] = seconds


@task(
    task_run_name="{cell.name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=worth_another_try,
)
def run_cell(cell: Cell, plan: Study, parent: str, slots: threading.Semaphore, budget: Budget) -> dvc.Outcome:
    """Train and score one arm. Raises BudgetSpent, or dvc.StageFailed."""
    with slots:
        budget.reserve(cell.name)
        began = time.monotonic()
        try:
            outcome = run_stage.fn(f"distill@{cell.name}", parent, FREE, diverged(cell.name, plan.diverged_above))
            run_stage.fn(f"evaluate@{cell.name}", parent, FREE)
        finally:
            budget.spend(cell.name, time.monotonic() - began)
        budget.spend(cell.name, Cost.read(STUDENTS / cell.name / "cost.json").train_seconds)
    return outcome


FREE = threading.Semaphore(2**20)  # of a stage inside a cell, which holds a slot already


@flow(name="alignti-study", on_failure=[notify.failed], on_crashed=[notify.failed])
def study(name: str, parallel: Annotated[int, Field(ge=1, le=64)] = 1, recipe: str | None = None) -> dict[str, str]:
    """Run every arm of the study that has not been run; returns what became of each.

    Args:
        name: params/studies/NAME.yaml.
        parallel: arms at a time; each takes a GPU where there are any.
        recipe: params/recipes/NAME.yaml, merged into params/ first.

    Raises:
        AlignTIError: naming the arms that are missing and why; all others were run and recorded.
    """
    end_with_worker()
    with folder(own=True):
        if recipe:
            print(recipes.use(recipe))
        cells, plan = expand.cells(name), expand.read(name)
        expand.expand(name)
        runtime = load_settings().runtime
        with tracking.stage_run(f"study-{name}", runtime=runtime, params={"study": name, "arms": len(cells)}) as run:
            run.tag("study", name)
            became = _run(cells, plan, run.id, parallel)
            for cell, outcome in became.items():
                run.tag(f"cell.{cell}", outcome)
            digests, varied = dvc.digests(), record.varied(cells)
            for arm in (arm for arm in cells if became[arm.name] in DONE):
                record.record(name, arm, varied, digests[str(STUDENTS / arm.name)], runtime, run.id)
            _send(runtime)
            create_table_artifact(
                key=f"study-{name}", table=[{"arm": c, "outcome": o} for c, o in became.items()], description=plan.about
            )
            missing = {cell: outcome for cell, outcome in became.items() if outcome not in DONE}
            if missing:
                lines = "\n".join(f"  {cell}: {why}" for cell, why in missing.items())
                raise AlignTIError(
                    f"{len(missing)} of {len(cells)} arms of study {name} are missing; the others are recorded."
                    f" `alignti study run {name}` runs what is missing:\n{lines}"
                )
            dvc.reproduce(CLOSING, {tracking.PARENT: run.id})
            gate()
    return became


def _run(cells: list[Cell], plan: Study, parent: str, parallel: int) -> dict[str, str]:
    """What all arms share, then the arms."""
    slots, budget = threading.Semaphore(parallel), Budget(plan.device_hours)
    of_cells = {f"{stage}@{cell.name}" for cell in cells for stage in ("distill", "evaluate")}
    shared: dict[str, PrefectFuture[dvc.Outcome]] = {}
    for stage, needs in dvc.graph().items():
        if stage not in of_cells and stage != CLOSING:
            upstream = [shared[before] for before in needs]
            shared[stage] = run_stage.submit(stage, parent, slots, wait_for=upstream, return_state=False)
    wait(list(shared.values()))
    for future in shared.values():
        future.result()  # without it no arm can run: the whole study fails here
    futures = {cell.name: run_cell.submit(cell, plan, parent, slots, budget, return_state=False) for cell in cells}
    wait(list(futures.values()))
    return {cell: _became(future) for cell, future in futures.items()}


def _became(future: PrefectFuture[dvc.Outcome]) -> str:
    try:
        return future.result()
    except AlignTIError as error:
        return str(error)


def _send(runtime: RuntimeSettings) -> None:
    """Send the records; a tracking server that is away costs a line, as it does a stage."""
    if runtime.tracking_uri == tracking.JOURNAL_ONLY:
        return
    try:
        mirror.sync(runtime.tracking_uri)
    except Exception as error:  # MLflow, its server and its database raise all sorts
        tracking.warn(
            f"MLflow does not take the records ({' '.join(str(error).split())[:300]}); `alignti sync` sends them later"
        )
