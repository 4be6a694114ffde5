from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterName
from prefect.client.schemas.objects import TaskRun
from prefect.client.schemas.sorting import FlowRunSort

from components.config import recipes
from components.errors import AlignTIError
from flows import dvc, dvc_repro
from flows import pipeline as module
from flows.pipeline import pipeline
from tests.flows.conftest import ran

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(autouse=True)
def retry_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "run_stage", module.run_stage.with_options(retry_delay_seconds=0.1))
    yield


def task_runs() -> list[TaskRun]:
    async def read() -> list[TaskRun]:
        async with get_client() as client:
            return await client.read_task_runs(task_run_filter=TaskRunFilter(name=TaskRunFilterName(like_="")))

    return asyncio.run(read())


def test_a_flow_run_is_tagged_with_its_recipe(project: Path) -> None:
    pipeline()
    with get_client(sync_client=True) as client:
        (latest,) = client.read_flow_runs(limit=1, sort=FlowRunSort.START_TIME_DESC)
    assert latest.tags == [recipes.nearest()[0]]


def test_the_flow_runs_dvcs_graph_and_leaves_dvc_nothing_to_do(project: Path) -> None:
    earlier = {run.id for run in task_runs()}
    assert set(pipeline(parallel=2).values()) == {"ran"}

    runs = {run.id: run for run in task_runs() if run.id not in earlier}
    edges = {run.name: sorted(runs[needed.id].name for needed in run.task_inputs.get("wait_for", [])) for run in runs.values()}
    assert edges == dvc.graph()

    parents = {line.split()[1] for line in (project / "ran.log").read_text().splitlines()}
    assert len(parents) == 1  # one parent run for all stages, and not an empty one
    assert sorted(ran(project)) == ["cell-a", "cell-b", "first", "last"]
    assert dvc_repro.reproduce_all() == "unchanged"
    assert ran(project) == []


def test_after_dvc_repro_the_flow_has_nothing_to_do(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks DVC once for all stages, and runs those alone that are stale or after one."""
    dvc_repro.reproduce_all()
    ran(project)
    reproduced: list[str] = []
    reproduce = dvc_repro.reproduce
    monkeypatch.setattr(
        dvc_repro, "reproduce", lambda stage, *args, **kw: [reproduced.append(stage), reproduce(stage, *args, **kw)][1]
    )
    assert set(pipeline().values()) == {"unchanged"}
    assert ran(project) == reproduced == []
    (project / "a.txt").write_text("other")
    assert pipeline() == {"first": "unchanged", "cell@a": "ran", "cell@b": "unchanged", "last": "unchanged"}
    assert sorted(reproduced) == ["cell@a", "last"]
    (project / "out/cell-b").unlink()
    assert pipeline()["cell@b"] == "restored"


def test_a_stage_that_exits_with_75_is_tried_again(project: Path) -> None:
    (project / "fail-first").write_text("75 75")
    assert pipeline()["first"] == "ran"
    assert ran(project)[:3] == ["first"] * 3


def test_a_stage_that_exits_with_2_is_not_and_what_needs_it_does_not_run(project: Path) -> None:
    (project / "fail-cell-a").write_text("2")
    with pytest.raises(dvc_repro.StageFailed, match="stage cell@a failed with exit code 2"):
        pipeline()
    assert sorted(ran(project)) == ["cell-a", "cell-b", "first"]


def test_the_gate_refuses_a_workspace_that_is_not_up_to_date(project: Path) -> None:
    with pytest.raises(AlignTIError, match="should have nothing to do, but stages ran"):
        module.gate()
