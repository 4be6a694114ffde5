"""Runs of a study: from MLflow, or from the CSV of an earlier comparison.

The CSV names its columns as MLflow's data frames do (`params.weights.tpa`, `metrics.exact_match`), so that results can be
published and compared again where the MLflow that recorded them is not.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from components.errors import DataError, InputError
from components.io import write_table
from components.study.expand import SEED
from components.tracking.journal import RECORDED
from components.tracking.outcome import CELL, FINGERPRINT
from components.tracking.stage_run import JOURNAL_ONLY

SCORE, HOURS, MEMORY = "exact_match", "cost/device_hours", "cost/peak_memory_mib"
PARAM, METRIC = "params.", "metrics."  # prefixes of columns
COLUMNS = ("run_id", "cell", "variant", "fingerprint")
METRICS = TypeAdapter(dict[str, Annotated[float, Field(gt=-1e100, lt=1e100)]])  # sums of which are finite
MAX_RUNS = 50_000  # maximum results of one MLflow search


@dataclass(frozen=True)
class Run:
    """Finished run of a cell."""

    id: str
    cell: str
    variant: str
    params: dict[str, str]  # parameters varied by the study
    metrics: dict[str, float]
    fingerprint: str
    started: int  # ms since 1970; of earlier results restored since, when that was
    experiment: str = ""  # MLflow's experiment id
    recipe: str = ""  # nearest recipe of the study's params; unknown of older runs

    @property
    def seed(self) -> str:
        return self.params.get(SEED, "")


def load_runs(tracking_uri: str, experiment: str, study: str) -> list[Run]:
    """Runs of a study from MLflow (`read`), after a sync of local journals, which a running study sends only at its end.

    Error messages leave out the address, which may hold a password.

    Raises:
        InputError: `tracking_uri` names no MLflow, or one without this experiment.
        TryAgainError: MLflow does not respond, or not to this version of it.
    """
    from components.tracking.mlflow_client import asking, client
    from components.tracking.mlflow_sync import try_sync

    if tracking_uri == JOURNAL_ONLY:
        raise InputError(
            f"tracking_uri is {JOURNAL_ONLY} (params/runtime.yaml, ALIGNTI_TRACKING_URI), and studies are compared in MLflow:"
            " give its address, and `alignti sync` sends it what the journals hold"
        )
    server = "the MLflow of tracking_uri (params/runtime.yaml, ALIGNTI_TRACKING_URI)"
    with asking(f"{server} does not answer", "`alignti status` says whether this folder's own is up"):
        mlflow = client(tracking_uri)
        try_sync(tracking_uri)
        return read(mlflow, experiment, study)


def read(client: Any, experiment: str, study: str) -> list[Run]:
    """Finished runs of the study's cells, oldest first. Raises InputError if MLflow has no such experiment."""
    mlflow_experiment = client.get_experiment_by_name(experiment)
    if mlflow_experiment is None:
        raise InputError(
            f"MLflow has no experiment {experiment!r} yet; run the study first, or name another in params/runtime.yaml"
        )
    query = f"tags.stage = '{CELL}' and tags.study = '{study}' and attributes.status = 'FINISHED'"
    runs = client.search_runs(
        [mlflow_experiment.experiment_id], query, max_results=MAX_RUNS, order_by=["attributes.start_time ASC"]
    )
    return [
        Run(
            id=run.info.run_id,
            cell=run.data.tags["cell"],
            variant=run.data.tags["variant"],
            params=dict(run.data.params),
            metrics=dict(run.data.metrics),
            fingerprint=run.data.tags.get(FINGERPRINT, "null"),
            started=max(run.info.start_time, int(run.data.tags.get(RECORDED, 0))),
            experiment=run.info.experiment_id,
            recipe=run.data.tags.get("recipe", ""),
        )
        for run in runs
    ]


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    """Write one line per run: its varied parameters and its metrics."""
    params = dict.fromkeys(PARAM + name for run in runs for name in run.params)
    metrics = sorted({METRIC + name for run in runs for name in run.metrics})
    rows = [
        dict(zip((*COLUMNS, "recipe"), (run.id, run.cell, run.variant, run.fingerprint, run.recipe), strict=True))
        | {PARAM + name: value for name, value in run.params.items()}
        | {METRIC + name: value for name, value in run.metrics.items()}
        for run in runs
    ]
    write_table(path, rows, [*COLUMNS, "recipe", *params, *metrics])


def read_csv(path: Path) -> list[Run]:
    """Runs as `write_csv` wrote them, in the file's order. Raises DataError, with the line, if it did not."""
    with path.open(encoding="utf-8-sig", newline="") as file:  # a spreadsheet may have begun it with a byte order mark
        reader, runs = csv.DictReader(file, strict=True), []
        try:
            if doubled := [name for name, times in Counter(reader.fieldnames or ()).items() if times > 1]:
                raise ValueError(f"{doubled[0]} heads two columns")
            for row in reader:
                runs.append(_run(row))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: {error}") from None
        except ValidationError as error:
            problem = error.errors()[0]
            raise DataError(f"{path}: line {reader.reader.line_num}: {METRIC}{problem['loc'][0]}: {problem['msg']}") from None
        except (ValueError, RecursionError, csv.Error) as error:
            raise DataError(f"{path}: line {reader.reader.line_num}: {error}") from None
    if not runs:
        raise DataError(f"{path} holds no run")
    return runs


def _run(row: dict[str, Any]) -> Run:
    if None in row or None in row.values():
        raise ValueError("more or fewer cells than the header has")
    missing = [name for name in (*COLUMNS, *(METRIC + metric for metric in (SCORE, HOURS, MEMORY))) if not row.get(name)]
    if missing:
        raise ValueError(f"no {missing[0]}; `alignti compare` writes such a file as compare.csv")
    if not isinstance(json.loads(row["fingerprint"]), dict | None):
        raise ValueError("the fingerprint is no JSON object")
    texts = {name.removeprefix(METRIC): text for name, text in row.items() if name.startswith(METRIC) and text}
    metrics = METRICS.validate_python(texts)
    if not 0 <= metrics[SCORE] <= 1 or min(metrics[HOURS], metrics[MEMORY]) < 0:
        raise ValueError(f"{SCORE} is a share of 1, and costs are not negative")
    return Run(
        id=row["run_id"],
        cell=row["cell"],
        variant=row["variant"],
        params={name.removeprefix(PARAM): row[name] for name in row if name.startswith(PARAM) and row[name]},
        metrics=metrics,
        fingerprint=row["fingerprint"],
        started=0,
        recipe=row.get("recipe", ""),
    )
