"""Study as a Prefect flow: its arms become DVC stages, are trained and scored, recorded, and compared.

    alignti study run NAME [--parallel N] [--recipe NAME] [--pool]

It runs in a workspace of its own; with `--pool` the arms are trained by workers. A failed arm does not stop the others; a rerun
trains what is missing and restores the rest from DVC's cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Annotated, get_args

from prefect import flow
from prefect.futures import PrefectFuture
from pydantic import Field

from components.config import recipes
from components.config.load import load_settings
from components.config.runtime import RuntimeSettings
from components.errors import AlignTIError
from components.records.distill import Cost
from components.records.paths import STUDENTS
from components.study import expand
from components.study.expand import Cell, Study
from components.tracking import mlflow_sync, outcome, provenance
from components.tracking.stage_run import PARENT, stage_run
from flows import dvc, dvc_repro, notify, prefect_artifacts, workspace
from flows.dvc_repro import Outcome
from flows.early_stopping import diverged
from flows.pipeline import (
    UNLIMITED,
    RecipeName,
    choice_field,
    end_with_worker,
    folder,
    gate,
    retrying_task,
    run_name,
    run_stage,
    run_stages,
    tag,
    wait_for,
)
from flows.remote_arms import NotMade, RemoteStages

FINAL_STAGE = "compare"  # the stage over all arms: run when none is missing
DONE = get_args(Outcome)
MAX_SUBMITTED = 64  # arms submitted to the pool at a time


class BudgetSpent(AlignTIError):
    """The study's device hours do not allow another arm."""


class Budget:
    """Seconds used by the study's arms on `devices` each, earlier runs included."""

    def __init__(self, hours: float | None, devices: int) -> None:
        self._hours, self._devices = hours, devices
        self._spent: dict[str, float] = {}
        self._reserved: dict[str, float] = {}
        self._changed = threading.Condition()

    def reserve(self, arm: str) -> None:
        """Raises BudgetSpent if an arm of mean cost would pass the cap. The first runs alone, as the first estimate."""
        with self._changed:
            self._changed.wait_for(lambda: self._hours is None or self._spent or not self._reserved)
            expected = sum(self._spent.values()) / len(self._spent) if self._spent else 0.0
            total = sum(self._spent.values()) + sum(self._reserved.values())
            per_hour = 3600 / self._devices
            if self._hours is not None and total + expected > self._hours * per_hour:
                raise BudgetSpent(f"{arm} is not run: {total / per_hour:.2f} of {self._hours:g} device hours are spent")
            self._reserved[arm] = expected

    def spend(self, arm: str, seconds: float) -> None:
        with self._changed:
            self._reserved.pop(arm, None)
            self._spent[arm] = seconds
            self._changed.notify_all()


@retrying_task("{cell.name}")
def run_cell(
    cell: Cell,
    plan: Study,
    parent: str,
    slots: threading.Semaphore,
    budget: Budget,
    record: Callable[[Cell], None],
    pool: RemoteStages | None = None,
) -> Outcome:
    """Train, score, record one arm, here or by the pool. Raises BudgetSpent, StageFailed, or AlignTIError of the pool."""
    train_stage, score_stage = f"distill@{cell.name}", f"evaluate@{cell.name}"
    with slots:
        budget.reserve(cell.name)
        start, waiting = time.monotonic(), 0.0
        try:
            if pool:
                ran_remotely = pool.restore_or_run(
                    cell.name, [train_stage, score_stage], lambda stage: run_stage.fn(stage, parent, UNLIMITED)
                )
                stage_outcome: Outcome = "ran" if ran_remotely else "restored"
            else:
                stage_outcome = run_stage.fn(train_stage, parent, UNLIMITED, diverged(cell.name, plan.diverged_above))
                run_stage.fn(score_stage, parent, UNLIMITED)
        except NotMade as failure:  # waiting for a worker is not charged
            waiting = time.monotonic() - start - failure.seconds
            raise
        finally:
            budget.spend(cell.name, time.monotonic() - start - waiting)
        budget.spend(cell.name, Cost.read(STUDENTS / cell.name / "cost.json").train_seconds)
        record(cell)  # at once: the results of a stopped study can be compared
    return stage_outcome


@flow(name="alignti-study", flow_run_name=run_name, on_failure=[notify.failed], on_crashed=[notify.failed])
def study(
    name: Annotated[str, choice_field(expand.names())],
    parallel: Annotated[int, Field(ge=1, le=64)] | None = None,
    recipe: RecipeName = None,
    over_pool: bool = False,
) -> dict[str, str]:
    """Run every arm of the study that has not been run; returns what became of each.

    Args:
        name: params/studies/NAME.yaml.
        parallel: arms at a time, each on a GPU where there are any; none: 1, or over the pool as many as workers take.
        recipe: params/recipes/NAME.yaml, merged into params/ first.
        over_pool: hand each arm out as a flow run of its own, for any worker of the pool; else all are run here.

    Raises:
        AlignTIError: naming the arms that are missing and why; all others were run and recorded.
    """
    end_with_worker()
    with folder(isolated=True, recipe=recipe):
        nearest = recipe or recipes.nearest()[0]
        tag(name, nearest)
        cells, plan = expand.cells(name), expand.read(name)
        expand.expand(name)
        runtime = load_settings().runtime
        run_context = stage_run(f"study-{name}", runtime=runtime, params={"study": name, "arms": len(cells)}, metered=False)
        with prefect_artifacts.linked(runtime, run_context) as run:
            run.tag("study", name)
            pool = RemoteStages(name, workspace.head(), recipe, run.id) if over_pool else None
            record = _recorder(name, nearest, cells, runtime)
            budget = Budget(plan.device_hours, runtime.devices)
            outcomes = _run(cells, plan, run.id, parallel or (MAX_SUBMITTED if pool else 1), budget, record, pool)
            for arm, arm_outcome in outcomes.items():
                run.tag(f"cell.{arm}", arm_outcome)
            mlflow_sync.try_sync(runtime.tracking_uri)
            missing = {cell: outcome for cell, outcome in outcomes.items() if outcome not in DONE}
            if missing:
                lines = "\n".join(f"  {cell}: {why}" for cell, why in missing.items())
                raise AlignTIError(
                    f"{len(missing)} of {len(cells)} arms of study {name} are missing; the others are recorded."
                    f" `alignti study run {name}` runs what is missing:\n{lines}"
                )
            dvc_repro.reproduce(FINAL_STAGE, {PARENT: run.id})
            gate()
            prefect_artifacts.leaderboard()
    return outcomes


def _recorder(name: str, recipe: str | None, cells: list[Cell], runtime: RuntimeSettings) -> Callable[[Cell], None]:
    tags = {"study": name} | ({"recipe": recipe} if recipe else {})
    varied = outcome.varied({cell.name: cell.arm.model_dump(mode="json") for cell in cells})

    def record(cell: Cell) -> None:
        md5 = provenance.digests()[str(STUDENTS / cell.name)]
        outcome.record(cell.name, md5, varied[cell.name], runtime, outcome.CELL, variant=cell.variant, **tags)

    return record


def _run(
    cells: list[Cell],
    plan: Study,
    parent: str,
    parallel: int,
    budget: Budget,
    record: Callable[[Cell], None],
    pool: RemoteStages | None,
) -> dict[str, str]:
    """Run the shared stages, then the arms; returns the outcome per arm."""
    slots = threading.Semaphore(parallel)
    if pool:
        pool.restore_or_run("shared", list(_shared(cells)), lambda stage: run_stage(stage, parent, UNLIMITED))
    else:
        run_stages("shared stages", _shared(cells), parent, slots)  # without them no arm can run, and the whole study fails
    futures = {c.name: run_cell.submit(c, plan, parent, slots, budget, record, pool, return_state=False) for c in cells}
    wait_for("arms", futures)
    return {cell: _outcome_or_error(future) for cell, future in futures.items()}


def _shared(cells: list[Cell]) -> dict[str, list[str]]:
    """Graph of the stages before the arms, in DVC's order."""
    cell_stages = {f"{stage}@{cell.name}" for cell in cells for stage in ("distill", "evaluate")}
    return {stage: needs for stage, needs in dvc.graph().items() if stage not in cell_stages and stage != FINAL_STAGE}


def _outcome_or_error(future: PrefectFuture[Outcome]) -> str:
    try:
        return future.result()
    except AlignTIError as error:
        return str(error)
