"""MLflow's client, its faults in this project's words, and the local database that it keeps runs in."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from components.errors import AlignTIError, InputError, TryAgainError
from components.process import locked

LOCAL = "sqlite:///"
MOVED = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))


@contextmanager
def asking(fault: str, but: str) -> Iterator[None]:
    """Raises InputError where MLflow is not installed, and TryAgainError for whatever it, its server and its database raise:
    `fault`, the first of what they say, and what is true all the same, `but`."""
    try:
        yield
    except AlignTIError:
        raise
    except ImportError:
        raise InputError("MLflow is not installed here: pip install -c constraints.txt -e '.[pipeline]'") from None
    except Exception as error:
        raise TryAgainError(f"{fault} ({one_line(error)}); {but}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def client(tracking_uri: str) -> Any:
    """An MLflow client that gives up soon and keeps quiet. Raises ImportError where MLflow is not installed."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # MLflow's own: 7, with pauses that double
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # MLflow's own: 120 s
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_DISABLE_AGENT_HINT": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the address, with its login, at the end of each run
        "DO_NOT_TRACK": "true",
    }.items():
        os.environ.setdefault(name, value)
    if tracking_uri.startswith(LOCAL):
        database = Path(tracking_uri.removeprefix(LOCAL)).resolve()  # MLflow would make it again wherever we go
        make_database(database)
        _move_artifacts(database)
        tracking_uri = f"{LOCAL}{database}"
    return _client(tracking_uri)


def _client(tracking_uri: str) -> Any:
    import mlflow

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return mlflow.MlflowClient(tracking_uri=tracking_uri)


def make_database(path: Path) -> None:
    """MLflow's SQLite file, made whole under another name: where several make it, or one is killed meanwhile, MLflow leaves a
    database that it never opens again. Such a one, which holds no run yet, is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if path.exists() and (_select(path, "select count(*) from runs") or _is_whole(path)):
            return
        draft = path.with_suffix(".draft")
        for left in path.parent.glob(f"{draft.name}*"):  # by a process that was killed; SQLite's journals too
            left.unlink()
        _client(f"{LOCAL}{draft}").search_experiments()
        draft.replace(path)


def _is_whole(path: Path) -> bool:
    """Are its tables those of the MLflow that is installed?"""
    import mlflow
    from alembic.script import ScriptDirectory

    migrations = ScriptDirectory(str(Path(mlflow.__file__).parent / "store/db_migrations"))
    return bool(_select(path, "select version_num from alembic_version") == migrations.get_current_head())


def _move_artifacts(database: Path) -> None:
    """Let runs look for their files beside this database: MLflow keeps whole paths, which a clone that was moved or copied
    leaves pointing into the old folder."""
    here = (database.parent / "artifacts").as_uri()
    ours = re.compile(rf"(file://.*/{re.escape(database.parent.name)}/artifacts)(/.*)?$")
    with closing(sqlite3.connect(database, timeout=30)) as opened, opened:
        found = {ours.match(location or "") for (location,) in opened.execute("select artifact_location from experiments")}
        for before in {match[1] for match in found if match} - {here}:
            for table, column in MOVED:
                opened.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where {column} = ? or {column} like ? || '/%'",
                    (here, len(before) + 1, before, before),
                )


def _select(path: Path, asked: str) -> Any:
    with closing(sqlite3.connect(path)) as database:
        try:
            row = database.execute(asked).fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            return None
    return row and row[0]
