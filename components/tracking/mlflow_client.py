"""MLflow client, its errors as errors of this project, and its local SQLite database."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from components.errors import AlignTIError, InputError, TryAgainError, redact
from components.process import locked
from components.tracking.journal import JOURNALS

LOCAL = "sqlite:///"
LOCATION_COLUMNS = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))


def check_recorded(tracking_uri: str) -> None:
    """Raises InputError if this folder's own database is not there yet, nor any journal: MLflow takes seconds for that."""
    database_exists = not tracking_uri.startswith(LOCAL) or Path(tracking_uri.removeprefix(LOCAL)).exists()
    if not database_exists and not any(JOURNALS.glob("*.jsonl")):
        raise InputError("no run is recorded here yet: `make repro`, `dvc repro` and `alignti study run` record theirs")


@contextmanager
def asking(fault: str, unchanged: str) -> Iterator[None]:
    """Raises InputError if MLflow is not installed, and TryAgainError for any error of MLflow, its server or its database, with
    the message `fault`, the error's first 300 characters without secrets, and `unchanged`, the state that stays."""
    try:
        yield
    except AlignTIError:
        raise
    except ImportError:
        raise InputError("MLflow is not installed here: pip install -c constraints.txt -e '.[pipeline]'") from None
    except Exception as error:
        raise TryAgainError(f"{fault} ({one_line(error)}); {unchanged}") from error


def one_line(error: Exception) -> str:
    return redact(" ".join(str(error).split()))[:300]


def client(tracking_uri: str) -> Any:
    """MLflow client with few retries, short timeouts and no log output. Raises ImportError if MLflow is not installed."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # default: 7, with exponential backoff
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # default: 120 s
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_DISABLE_AGENT_HINT": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # URL with its login, at the end of each run
        "DO_NOT_TRACK": "true",
    }.items():
        os.environ.setdefault(name, value)
    if tracking_uri.startswith(LOCAL):
        database = Path(tracking_uri.removeprefix(LOCAL)).resolve()  # absolute: after a chdir MLflow would make another
        make_database(database)
        _move_artifacts(database)
        tracking_uri = f"{LOCAL}{database}"
    return _client(tracking_uri)


def _client(tracking_uri: str) -> Any:
    import mlflow

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(tracking_uri)  # for create_external_model and load_dict, which take no URI
    return mlflow.MlflowClient(tracking_uri=tracking_uri)


def make_database(path: Path) -> None:
    """Create MLflow's SQLite file as a draft and rename it: concurrent or killed migrations leave a database that MLflow never
    opens again. A broken one that holds no run yet is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if path.exists() and (_select(path, "select count(*) from runs") or _has_current_schema(path)):
            return
        draft = path.with_suffix(".draft")
        for stale in path.parent.glob(f"{draft.name}*"):  # drafts of killed processes; SQLite's journals too
            stale.unlink()
        _client(f"{LOCAL}{draft}").search_experiments()
        draft.replace(path)


def _has_current_schema(path: Path) -> bool:
    """Whether the schema version is that of the installed MLflow."""
    import mlflow
    from alembic.script import ScriptDirectory

    migrations = ScriptDirectory(str(Path(mlflow.__file__).parent / "store/db_migrations"))
    return bool(_select(path, "select version_num from alembic_version") == migrations.get_current_head())


def _move_artifacts(database: Path) -> None:
    """Rewrite artifact locations to the folder of this database: MLflow stores absolute paths, which still point to the old
    folder in a moved or copied clone."""
    artifacts = (database.parent / "artifacts").as_uri()
    pattern = re.compile(rf"(file://.*/{re.escape(database.parent.name)}/artifacts)(/.*)?$")
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        rows = connection.execute("select artifact_location from experiments")
        matches = {pattern.match(location or "") for (location,) in rows}
        for old in {match[1] for match in matches if match} - {artifacts}:
            for table, column in LOCATION_COLUMNS:
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where {column} = ? or {column} like ? || '/%'",
                    (artifacts, len(old) + 1, old, old),
                )


def _select(path: Path, query: str) -> Any:
    with closing(sqlite3.connect(path)) as database:
        try:
            row = database.execute(query).fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            return None
    return row and row[0]
