"""Sync of run journals (`journal.py`) to MLflow, resumed from the last line that was sent.

Sending the same lines twice changes nothing: a run is found again by its tag `alignti.run`, and MLflow takes equal
points, params, tags and inputs once. So it may be stopped anywhere and started again.

    python -m components.tracking.mlflow_sync JOURNAL...        what a stage starts: follows them until stdin closes
    python -m ... JOURNAL --below RUN                           what a flow starts: follows its stages' journals, too
    alignti sync                                                sends every journal that is left
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import posixpath
import re
import select
import shutil
import signal
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from components.errors import DataError
from components.io import write_text
from components.process import is_free, locked
from components.records.record import parsed
from components.tracking import mlflow_registry
from components.tracking.stage_run import JOURNAL_ONLY, JOURNALS, NOT_SENT_AND_SAID_SO, SENT, warn

LOCAL = "sqlite:///"
PAUSE_S = 3  # between two looks at a growing journal
PAUSE_AFTER_FAULT_S = 30
METRICS_PER_CALL = 1000  # MLflow's limit
PARAMS_PER_CALL = 100  # MLflow's limit
PARAM_CHARS = 6000  # MLflow's limit
DIGEST_CHARS = 36  # MLflow's limit; an md5 of DVC's, `.dir` and all, just fits
TAG_CHARS = 8000  # MLflow's limit
NAME_CHARS = 250  # MLflow's limit
MOVED = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))
MAKING = JOURNALS / ".lock"  # held between looking for a run and making it
FORBIDDEN_IN_NAME = re.compile(r"[^\w\-. :/]")

EXPERIMENT = {
    "mlflow.experimentKind": "custom_model_development",  # MLflow guesses one for language models that are asked, else
    "mlflow.note.content": """\
One run per arm, `tags.stage = "arm"`: weights, scores, cost. Select them and *Compare*; `make repro` prints the address.
One run per stage, `tags.stage = "distill"`, below its pipeline or `dvc repro`: losses over steps, inputs and outputs.
Cells of a study: `tags.stage = "cell" and tags.study = "NAME"`; `alignti compare NAME` says what they show.""",
}

ORIGIN, MADE = "origin.json", "made"  # artifacts of a stage's run: what `alignti reproduce` reads


class Mirror:
    """One journal and its run in MLflow. Raises whatever MLflow raises; the next `send` goes on from there."""

    def __init__(self, journal: Path, tracking_uri: str) -> None:
        self._journal = journal
        self._uri = tracking_uri
        self._state_file = journal.with_suffix(".sent")
        self._state: dict[str, Any] = {"run_id": None, "bytes": 0, "done": False}
        if self._state_file.exists():
            self._state = parsed(self._state_file)
        self._opening = _first(journal)
        self._client = client(tracking_uri)
        if self._state["run_id"] is not None and not self._has(self._state["run_id"]):
            self._state |= {"run_id": None, "bytes": 0, "done": False}  # deleted, or another database: all is sent anew

    def _has(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def send(self, abandoned: bool = False) -> bool:
        """Send what the journal has gained; true when its end has been sent. `abandoned`: nobody will write more to it."""
        with self._journal.open("rb") as file:
            file.seek(self._state["bytes"])
            gained = file.read()
        gained = gained[: gained.rfind(b"\n") + 1]  # half a line is not there yet, or, after a crash, never will be
        lines = [_event(self._journal, line) for line in gained.splitlines()]
        if abandoned and not (lines and lines[-1]["event"] == "end"):
            lines.append({"event": "end", "time": int(self._journal.stat().st_mtime * 1000), "status": "KILLED"})
        if self._state["run_id"] is None:
            self._save(run_id=self._open())
        for event, group in groupby(lines, key=lambda line: line["event"]):
            getattr(self, f"_{event}")(self._state["run_id"], list(group))
        done = bool(lines) and lines[-1]["event"] == "end"
        self._save(bytes=self._state["bytes"] + len(gained), done=done)
        if done:
            shutil.rmtree(self._journal.with_suffix(".files"), ignore_errors=True)
        return done

    def _save(self, **state: Any) -> None:
        self._state |= state
        write_text(self._state_file, json.dumps(self._state) + "\n")

    def _open(self) -> str:
        """The MLflow run of this journal, and its parent: found, or made."""
        start = self._opening
        self._state["experiment"] = experiment = self._experiment(start["experiment"])
        tags = dict(start["tags"])
        if parent := start["parent"]:
            tags["mlflow.parentRunId"] = self._parent_id(experiment, parent, start["time"])
            if parent["ends_with_stages"]:
                self._client.update_run(tags["mlflow.parentRunId"], status="RUNNING")
        return self._find_or_make(experiment, self._journal.stem, start["name"], start["time"], tags)

    def _experiment(self, name: str) -> str:
        with locked(MAKING):
            if found := self._client.get_experiment_by_name(name):
                if found.lifecycle_stage != "active":
                    raise DataError(
                        f"experiment {name!r} was deleted in MLflow: `mlflow experiments restore -x {found.experiment_id}`"
                        " brings it back; `experiment` of params/runtime.yaml names another for later runs"
                    )
                return found.experiment_id
            beside = Path(self._uri.removeprefix(LOCAL)).resolve().parent / "artifacts"
            return self._client.create_experiment(name, beside.as_uri() if self._uri.startswith(LOCAL) else None, EXPERIMENT)

    def _parent_id(self, experiment: str, parent: dict[str, Any], started: int) -> str:
        if len(parent["id"]) == 32 and set(parent["id"]) <= set("0123456789abcdef"):
            return parent["id"]  # an MLflow run id, given by whoever opened that run
        tags = {"stage": "pipeline", **parent.get("tags", {})}
        return self._find_or_make(experiment, parent["id"], parent["name"], started, tags, ours=False)

    def _find_or_make(self, experiment: str, key: str, name: str, started: int, tags: dict[str, str], ours: bool = True) -> str:
        """`ours`: the run of this journal, which knows its name and tags better than a child that made it before."""
        with locked(MAKING):
            found = self._client.search_runs([experiment], f"tags.`alignti.run` = '{key}'", max_results=1)
            if found:
                run_id = found[0].info.run_id
                for tag, value in {**tags, "mlflow.runName": name}.items() if ours else ():
                    self._client.set_tag(run_id, tag, value)
                return run_id
            made = self._client.create_run(experiment, started, {**tags, "alignti.run": key}, run_name=name)
            return made.info.run_id

    # One method per kind of line; each takes consecutive lines of that kind.

    def _start(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        pass  # sent by _open

    def _resume(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        self._client.update_run(run_id, status="RUNNING")
        self._client.set_tag(run_id, "attempts", str(lines[-1]["attempt"]))

    def _origin(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        self._client.log_dict(run_id, {key: lines[-1][key] for key in ("params", "uncommitted")}, ORIGIN)
        self._client.set_tag(run_id, "git.uncommitted", " ".join(lines[-1]["uncommitted"])[:TAG_CHARS])

    def _made(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._client.set_tag(run_id, fitting(f"out.{line['path']}"), line["md5"])
            self._client.log_dict(run_id, {key: line[key] for key in ("path", "md5", "files")}, f"{MADE}/{line['path']}.json")

    def _link(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        experiment = self._client.get_run(run_id).info.experiment_id
        for line in lines:
            out = fitting(f"out.{line['path']}")
            asked = f"tags.`alignti.run` = '{line['run']}'" if line["run"] else f"tags.`{out}` = '{line['md5']}'"
            found = self._client.search_runs([experiment], asked, max_results=1, order_by=["attributes.start_time ASC"])
            if named := found[0].info.run_id if found else line["run"]:
                self._client.set_tag(run_id, fitting(line["key"].replace("@", "_")), named)

    def _register(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            mlflow_registry.register(self._client, run_id, line)

    def _params(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        from mlflow.entities import Param

        params = [Param(fitting(name), value[:PARAM_CHARS]) for line in lines for name, value in line["values"].items()]
        for some in _chunks(params, PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=some)

    def _metrics(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        points = [Metric(fitting(k), v, line["time"], line["step"] or 0) for line in lines for k, v in line["values"].items()]
        for some in _chunks(points, METRICS_PER_CALL):
            self._client.log_batch(run_id, metrics=some)

    def _artifact(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            path = self._journal.parent / line["path"]
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), path.name)
            elif path.exists():  # else it was sent before, to a run that was deleted since
                self._client.log_artifact(run_id, str(path))

    def _headline(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        if above := self._client.get_run(run_id).data.tags.get("mlflow.parentRunId"):
            self._metrics(above, [line | {"step": None} for line in lines])
            self._client.set_tag(above, "mlflow.note.content", lines[-1]["text"][:TAG_CHARS])

    def _dataset(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput

        for line in lines:
            source = json.dumps({"digest": line["digest"]})
            entry = Dataset(line["name"], line["digest"][:DIGEST_CHARS], line.get("source", "manifest"), source)
            self._client.log_inputs(run_id, [DatasetInput(entry, tags=[])])

    def _tag(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._client.set_tag(run_id, fitting(line["key"].replace("@", "_")), line["value"][:TAG_CHARS])

    def _end(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        status, ended = lines[-1]["status"], lines[-1]["time"]
        self._client.set_terminated(run_id, status, ended)
        if self._opening["parent"] and self._opening["parent"]["ends_with_stages"]:
            # Nobody sees `dvc repro` end, so its run ends with the latest of its stages.
            parent = self._client.get_run(run_id).data.tags["mlflow.parentRunId"]
            self._client.set_terminated(parent, status, ended)


def fitting(name: str) -> str:
    """`name` if MLflow takes it as that of a metric, parameter or tag; else one that is as much like it as MLflow takes.

    Names are paths to MLflow: `a//b`, `a/` and `..` are none. A row's `kind`, which a user chooses, is part of some.
    """
    clean = FORBIDDEN_IN_NAME.sub("_", name)
    if clean == name and posixpath.normpath(name) == name and name[0] not in "./" and len(name) <= NAME_CHARS:
        return name
    parts = (part if part.strip(".") else "_" * len(part) or "_" for part in clean.split("/"))
    told_apart = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{'/'.join(parts)[: NAME_CHARS - 9]}-{told_apart}"


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def sync(tracking_uri: str) -> tuple[int, int]:
    """Send every journal whose process has ended; returns how many were sent and how many are still being written.

    One that is damaged, or that MLflow calls wrong, does not keep back the others; it is raised at the end.
    """
    sent = live = 0
    refused: Exception | None = None
    for journal in sorted(filter(_is_left, JOURNALS.glob("*.jsonl")), key=_began):  # a run is linked to earlier ones
        if not is_free(journal):
            live += 1
            continue
        try:
            Mirror(journal, tracking_uri).send(abandoned=True)
            sent += 1
        except Exception as error:
            if not _is_of_one_journal(error):
                raise
            refused = error
    if refused:
        raise refused
    return sent, live


def _is_of_one_journal(error: Exception) -> bool:
    """It is damaged, or MLflow calls it wrong; others may still be taken."""
    return isinstance(error, DataError) or getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"


def try_sync(tracking_uri: str) -> bool:
    """`sync`, whether MLflow takes what there is; where it does not, a line says why."""
    if tracking_uri == JOURNAL_ONLY:
        return False
    try:
        sync(tracking_uri)
    except Exception as error:  # MLflow, its server and its database raise all sorts
        warn(f"MLflow does not take the journals ({' '.join(str(error).split())[:300]}); `alignti sync` sends them later")
        return False
    return True


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


def _is_left(journal: Path) -> bool:
    if not journal.stat().st_size:
        return False  # its process was killed before it wrote a word
    file = journal.with_suffix(".sent")
    state = parsed(file) if file.exists() else {"done": False}
    return not state["done"] or state["bytes"] < journal.stat().st_size  # a recorded run may gain its registration


def _began(journal: Path) -> tuple[int, str]:
    try:
        return _first(journal)["time"], journal.name
    except DataError:  # `Mirror` says so
        return 0, journal.name


def _first(journal: Path) -> dict[str, Any]:
    with journal.open("rb") as lines:
        return _event(journal, lines.readline())


def _event(journal: Path, line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        raise DataError(f"{journal} holds a line that is no event: damaged; delete it, and that run is not sent") from None


def follow(journals: Sequence[Path], tracking_uri: str, voice: IO[str], below: str | None = None) -> bool:
    """Send `journals` while stdin stays open, and their rest when it closes; true when all is sent. Says one fault at most.

    `below`: a flow's run, whose stages are followed too as they begin, so that they need no sender of their own.
    """
    left: dict[Path, Mirror | None] = dict.fromkeys(journals)
    known, silent, complete, refused = set(journals), False, False, False
    while True:
        pause = PAUSE_S
        for journal in list(left):
            try:
                mirror = left[journal] = left[journal] or Mirror(journal, tracking_uri)
                if mirror.send(abandoned=complete if journal in journals else is_free(journal)):
                    del left[journal]
            except Exception as error:  # MLflow, its server and its database raise all sorts
                pause = PAUSE_AFTER_FAULT_S
                if not silent:
                    reason = " ".join(str(error).split())[:300]
                    warn(f"MLflow at {tracking_uri} does not take this run ({reason}); `alignti sync` sends it later", voice)
                    silent = True
                if isinstance(error, ImportError):
                    return False
                if not _is_of_one_journal(error):
                    break
                refused = True
                del left[journal]
        begun = _begun(below, known) if below else []
        left |= dict.fromkeys(begun)
        if not begun and (complete or not left):
            return not left and not refused
        complete = complete or bool(select.select([sys.stdin], [], [], 0 if begun else pause)[0])


def _begun(below: str, known: set[Path]) -> list[Path]:
    """The journals of runs whose parent is `below` that have begun since; `known` gains all that were looked at."""
    begun = []
    for journal in sorted(set(JOURNALS.glob("*.jsonl")) - known):
        with journal.open("rb") as lines:
            first = lines.readline()
        if first.endswith(b"\n"):  # else it is being written
            known.add(journal)
            if f'"{below}"'.encode() in first and (_first(journal)["parent"] or {}).get("id") == below:
                begun.append(journal)
    return begun


def main() -> None:
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they end the stage; what it leaves is still to be sent
        signal.signal(ending, signal.SIG_IGN)
    voice = os.fdopen(os.dup(2), "w", errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MLflow's and Alembic's chatter
    uri = os.environ["ALIGNTI_TRACKING_URI"]
    parser = argparse.ArgumentParser()
    parser.add_argument("journals", nargs="+", type=Path)
    parser.add_argument("--below", help="the run whose stages are followed, too")
    asked = parser.parse_args()
    sent = follow(asked.journals, uri, voice, asked.below)
    voice.flush()
    os._exit(
        SENT if sent else NOT_SENT_AND_SAID_SO
    )  # taking MLflow's modules down lasts as long as sending, and the stage waits


if __name__ == "__main__":
    main()
