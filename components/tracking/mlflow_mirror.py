"""Mirror of one run journal (`journal.py`) in MLflow, resumed from the last line that was sent.

Sending is idempotent: the run is found by its tag `alignti.run`, and MLflow stores equal points, params, tags and inputs once.
So the mirror may be stopped anywhere and restarted.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

from components.errors import DataError
from components.io import write_text
from components.process import locked
from components.records.record import parsed
from components.tracking import mlflow_registry
from components.tracking.journal import JOURNALS, events_from, first_event
from components.tracking.mlflow_client import LOCAL, client

METRICS_PER_CALL = 1000  # MLflow's limit
PARAMS_PER_CALL = 100  # MLflow's limit
PARAM_CHARS = 6000  # MLflow's limit
DIGEST_CHARS = 36  # MLflow's limit; an md5 of DVC's, `.dir` and all, just fits
TAG_CHARS = 8000  # MLflow's limit
NAME_CHARS = 250  # MLflow's limit
RUN_LOCK = JOURNALS / ".lock"  # lock around finding or creating a run
FORBIDDEN_IN_NAME = re.compile(r"[^\w\-. :/]")


EXPERIMENT = {
    "mlflow.experimentKind": "custom_model_development",  # otherwise MLflow guesses one for LLM applications
    "mlflow.note.content": """\
One run per arm, `tags.stage = "arm"`: weights, scores, cost. Select them and *Compare*; `make repro` prints the address.
One run per stage, `tags.stage = "distill"`, below its pipeline or `dvc repro`: losses over steps, inputs and outputs.
Cells of a study: `tags.stage = "cell" and tags.study = "NAME"`; `alignti compare NAME` says what they show.""",
}

UNSENT: dict[str, Any] = {"run_id": None, "bytes": 0, "done": False}  # state of a journal that is not in MLflow
ORIGIN, OUTS = "origin.json", "made"  # artifacts of a stage's run, read by `alignti reproduce`


class Mirror:
    """Journal and its MLflow run. MLflow's errors propagate; the next `send` resumes from the saved offset."""

    def __init__(self, journal: Path, tracking_uri: str) -> None:
        self._journal = journal
        self._uri = tracking_uri
        self._state_file = journal.with_suffix(".sent")
        self._state = parsed(self._state_file) if self._state_file.exists() else dict(UNSENT)
        self._start_event = first_event(journal)
        self._client = client(tracking_uri)
        if self._state["run_id"] is not None and not self._run_exists(self._state["run_id"]):
            self._state |= UNSENT  # deleted, or another database: resend everything

    def _run_exists(self, run_id: str) -> bool:
        run = mlflow_registry.none_if_absent(lambda: self._client.get_run(run_id))
        return run is not None and run.info.lifecycle_stage == "active"

    def send(self, abandoned: bool = False) -> bool:
        """Send new events; true once the end event is sent. `abandoned`: no writer left, a missing end is KILLED."""
        lines, end = events_from(self._journal, self._state["bytes"])
        if not lines and (self._state["done"] or not abandoned):
            return abandoned  # the state of an ended run stays
        if abandoned and not (lines and lines[-1]["event"] == "end"):
            lines.append({"event": "end", "time": int(self._journal.stat().st_mtime * 1000), "status": "KILLED"})
        if self._state["run_id"] is None:
            self._save(run_id=self._open())
        for event, group in groupby(lines, key=lambda line: line["event"]):
            getattr(self, f"_{event}")(self._state["run_id"], list(group))
        done = bool(lines) and lines[-1]["event"] == "end"
        self._save(bytes=end, done=done)
        if done:
            shutil.rmtree(self._journal.with_suffix(".files"), ignore_errors=True)
        return done

    def _save(self, **state: Any) -> None:
        self._state |= state
        write_text(self._state_file, json.dumps(self._state) + "\n")

    def _open(self) -> str:
        """MLflow run of this journal and its parent run, found or created."""
        start = self._start_event
        self._state["experiment"] = experiment = self._experiment(start["experiment"])
        tags = dict(start["tags"])
        if parent := start["parent"]:
            tags["mlflow.parentRunId"] = self._parent_id(experiment, parent, start["time"])
            if parent["ends_with_stages"]:
                self._client.update_run(tags["mlflow.parentRunId"], status="RUNNING")
        return self._find_or_create(experiment, self._journal.stem, start["name"], start["time"], tags)

    def _experiment(self, name: str) -> str:
        with locked(RUN_LOCK):
            if experiment := self._client.get_experiment_by_name(name):
                if experiment.lifecycle_stage != "active":
                    raise DataError(
                        f"experiment {name!r} was deleted in MLflow: `mlflow experiments restore -x {experiment.experiment_id}`"
                        " brings it back; `experiment` of params/runtime.yaml names another for later runs"
                    )
                return experiment.experiment_id
            artifacts = Path(self._uri.removeprefix(LOCAL)).resolve().parent / "artifacts"
            return self._client.create_experiment(name, artifacts.as_uri() if self._uri.startswith(LOCAL) else None, EXPERIMENT)

    def _parent_id(self, experiment: str, parent: dict[str, Any], started: int) -> str:
        if len(parent["id"]) == 32 and set(parent["id"]) <= set("0123456789abcdef"):
            return parent["id"]  # an MLflow run id, from $ALIGNTI_PARENT_RUN_ID
        tags = {"stage": "pipeline", **parent.get("tags", {})}
        return self._find_or_create(experiment, parent["id"], parent["name"], started, tags, own=False)

    def _find_or_create(self, experiment: str, key: str, name: str, start: int, tags: dict[str, str], own: bool = True) -> str:
        """`own`: run of this journal; its name and tags replace those of a child that created it as its parent."""
        with locked(RUN_LOCK):
            runs = self._client.search_runs([experiment], f"tags.`alignti.run` = '{key}'", max_results=1)
            if runs:
                run_id = runs[0].info.run_id
                for tag, value in {**tags, "mlflow.runName": name}.items() if own else ():
                    self._client.set_tag(run_id, tag, value)
                return run_id
            created = self._client.create_run(experiment, start, {**tags, "alignti.run": key}, run_name=name)
            return created.info.run_id

    # One method per event; each takes consecutive lines of that event.

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
            self._client.set_tag(run_id, valid_name(f"out.{line['path']}"), line["md5"])
            self._client.log_dict(run_id, {key: line[key] for key in ("path", "md5", "files")}, f"{OUTS}/{line['path']}.json")

    def _link(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        experiment = self._client.get_run(run_id).info.experiment_id
        for line in lines:
            output_tag = valid_name(f"out.{line['path']}")
            query = f"tags.`alignti.run` = '{line['run']}'" if line["run"] else f"tags.`{output_tag}` = '{line['md5']}'"
            runs = self._client.search_runs([experiment], query, max_results=1, order_by=["attributes.start_time ASC"])
            if target := runs[0].info.run_id if runs else line["run"]:
                self._client.set_tag(run_id, valid_name(line["key"].replace("@", "_")), target)

    def _register(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            mlflow_registry.register(self._client, run_id, line)

    def _params(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        from mlflow.entities import Param
        from mlflow.utils import chunk_list

        params = [Param(valid_name(name), value[:PARAM_CHARS]) for line in lines for name, value in line["values"].items()]
        for chunk in chunk_list(params, PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=chunk)

    def _metrics(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils import chunk_list

        points = [Metric(valid_name(k), v, e["time"], e["step"] or 0) for e in lines for k, v in e["values"].items()]
        for chunk in chunk_list(points, METRICS_PER_CALL):
            self._client.log_batch(run_id, metrics=chunk)

    def _artifact(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            path = self._journal.parent / line["path"]
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), path.name)
            elif path.exists():  # else it was sent before, to a run that was deleted since
                self._client.log_artifact(run_id, str(path))

    def _headline(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        if parent := self._parent_of(run_id):
            self._metrics(parent, [line | {"step": None} for line in lines])
            self._client.set_tag(parent, "mlflow.note.content", lines[-1]["text"][:TAG_CHARS])

    def _dataset(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput

        for line in lines:
            source = json.dumps({"digest": line["digest"]})
            entry = Dataset(line["name"], line["digest"][:DIGEST_CHARS], line.get("source", "manifest"), source)
            self._client.log_inputs(run_id, [DatasetInput(entry, tags=[])])

    def _tag(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._client.set_tag(run_id, valid_name(line["key"].replace("@", "_")), line["value"][:TAG_CHARS])

    def _end(self, run_id: str, lines: list[dict[str, Any]]) -> None:
        status, ended = lines[-1]["status"], lines[-1]["time"]
        self._client.set_terminated(run_id, status, ended)
        # The end of `dvc repro` is not observed, so its run ends with its last stage.
        if (self._start_event["parent"] or {}).get("ends_with_stages") and (parent := self._parent_of(run_id)):
            self._client.set_terminated(parent, status, ended)

    def _parent_of(self, run_id: str) -> str | None:
        """MLflow id of the parent run; None without one, or if it was deleted since."""
        parent = self._client.get_run(run_id).data.tags.get("mlflow.parentRunId")
        return parent if parent and self._run_exists(parent) else None


def valid_name(name: str) -> str:
    """`name` if MLflow accepts it for a metric, parameter or tag; else a sanitised name with 8 hex digits of a hash.

    MLflow validates names as paths: `a//b`, `a/` and `..` are invalid. Some contain a row's `kind`, which users choose.
    """
    clean = FORBIDDEN_IN_NAME.sub("_", name)
    if clean == name and posixpath.normpath(name) == name and name[0] not in "./" and len(name) <= NAME_CHARS:
        return name
    parts = (part if part.strip(".") else "_" * len(part) or "_" for part in clean.split("/"))
    suffix = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{'/'.join(parts)[: NAME_CHARS - 9]}-{suffix}"
