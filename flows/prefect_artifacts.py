"""Prefect artifacts of a flow run: progress, scores, links to its MLflow run and report.

Artifacts are for people and never read back, so one that Prefect rejects costs a line in the log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from prefect.artifacts import create_link_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.futures import PrefectFuture, as_completed
from prefect.logging import get_logger

from components.config.runtime import RuntimeSettings
from components.errors import AlignTIError, redact, without_login
from components.records.compare import Comparison
from components.records.paths import REPORTS
from components.records.record import Absent
from components.tracking import history
from components.tracking.journal import Run
from components.tracking.mlflow_client import one_line

REPORT = REPORTS / "report.html"
COMPARISON = REPORTS / "compare.json"
MAX_REASON_CHARS = 300  # characters of a reason in a table

ArtifactCall = Callable[..., Any]


def follow(title: str, futures: Mapping[str, PrefectFuture[Any]]) -> None:
    """Wait for all `futures`, with a progress artifact, then publish a table of outcomes by name.

    `title`, e.g. "stages", is the key of the table and, with `-progress`, of the bar.
    """
    key = title.replace(" ", "-")
    names = {id(future): name for name, future in futures.items()}
    outcomes: dict[str, str] = {}
    start = time.monotonic()
    bar = publish(create_progress_artifact, progress=0.0, key=f"{key}-progress", description=f"0 of {len(names)} {title} done")
    for future in as_completed(list(futures.values())):
        name = names[id(future)]
        outcomes[name] = _outcome(future)
        if bar is not None:
            done = f"{len(outcomes)} of {len(names)} {title} done"
            text = f"{done}; the last was {name}, {time.monotonic() - start:.0f} s after the start"
            publish(update_progress_artifact, artifact_id=bar, progress=100 * len(outcomes) / len(names), description=text)
    table = [{"name": name, "outcome": outcomes[name]} for name in futures]
    text = f"What became of the {title}: ran, restored, unchanged, or why not"
    publish(create_table_artifact, key=key, table=table, description=text)


def leaderboard() -> None:
    """The scores of reports/compare.json, best arm first, below the teacher's."""
    if not COMPARISON.exists() or Absent.reason_at(COMPARISON):
        return
    scores = Comparison.read(COMPARISON)
    teacher = {"arm": "teacher", "exact match": f"{scores.teacher.exact_match:.1%}", "95%": _interval(scores.teacher.ci95)}
    rows = [
        {
            "arm": arm,
            "exact match": f"{result.exact_match:.1%}",
            "95%": _interval(result.ci95),
            "of the teacher": "" if result.share_of_teacher is None else f"{result.share_of_teacher:.1%}",
            "training, s per step": f"{result.step_seconds:.3g}",
            "peak MiB": f"{result.peak_memory_mib:,.0f}",
        }
        for arm, result in ((arm, scores.arms[arm]) for arm in scores.order)
    ]
    publish(
        create_table_artifact,
        key="leaderboard",
        table=[teacher, *rows],
        description=f"{scores.headline}\n\n{scores.standing}",
    )


@contextmanager
def linked(runtime: RuntimeSettings, run_context: AbstractContextManager[Run]) -> Iterator[Run]:
    """Run that `run_context` opens; at its end, link artifacts to it and to the report kept in it."""
    with ExitStack() as afterwards, run_context as run:
        afterwards.callback(_link, run.id, runtime)
        try:
            yield run
        finally:
            if REPORT.exists():
                run.artifact(REPORT)  # the workspace, with the report, is removed when its flow run ends


def _link(run: str, runtime: RuntimeSettings) -> None:
    if address := mlflow_page(run, runtime):
        publish(create_link_artifact, key="mlflow-run", link=address, link_text="this run in MLflow")
        if REPORT.exists():
            publish(create_link_artifact, key="report", link=f"{address}/artifacts/{REPORT.name}", link_text="the report")


def mlflow_page(run: str, runtime: RuntimeSettings) -> str | None:
    """URL of this journal's run in MLflow, without login; None without a server, or before the run was sent."""
    if not runtime.tracking_uri.startswith(("http://", "https://")):
        return None
    sent = history.sync_state(run)
    if not sent or not sent.get("experiment"):
        return None
    return f"{without_login(runtime.tracking_uri).rstrip('/')}/#/experiments/{sent['experiment']}/runs/{sent['run_id']}"


def _outcome(future: PrefectFuture[Any]) -> str:
    try:
        return str(future.result())
    except AlignTIError as error:
        return redact(str(error))[:MAX_REASON_CHARS]
    except Exception as error:  # Prefect's own, e.g. of a stage whose inputs failed
        return f"not run: {redact(str(error))[:MAX_REASON_CHARS]}"


def publish(call: ArtifactCall, **fields: Any) -> Any:
    """Result of a Prefect call, or None and a line in the log."""
    try:
        return call(**fields)
    except Exception as error:  # any fault of server, database or network: no stage fails for it
        get_logger("alignti").warning("not shown on the flow run's page: %s", redact(one_line(error)))
        return None


def _interval(bounds: tuple[float, float]) -> str:
    return " to ".join(f"{bound:.1%}" for bound in bounds)
