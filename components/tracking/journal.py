"""Journal of one run, JSON lines under `.runs/journal/`, written before anything is sent to a tracking server.

An unreachable, slow or broken tracking server therefore costs one warning, never a training: `mlflow_sync.py` sends
the journal beside the stage, and `alignti sync` sends the rest.

Each line is an object with `event` and `time` (ms since 1970): start, resume, origin, params, metrics, artifact, dataset,
tag, link (to another run), made, headline (of the parent run), register, end.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from components.config.runtime import RuntimeSettings
from components.errors import DataError, redact
from components.io import write_text
from components.records.paths import RUNS
from components.tracking import provenance

JOURNALS = RUNS / "journal"
RECORDED = "recorded"  # tag: when results that were superseded became the current ones again, ms since 1970


class Run:
    """Journal writer of one run. No method raises on a tracking fault; with `journal` None all are no-ops."""

    def __init__(self, journal: Path | None) -> None:
        """Appends to an existing journal. Raises BlockingIOError if another process is writing it."""
        self.id = journal.stem if journal else ""
        self._journal = journal
        self._file: IO[str] | None = None
        self._lock = threading.Lock()  # the meter's thread writes too
        if journal is not None:
            try:
                journal.parent.mkdir(parents=True, exist_ok=True)
                self._file = journal.open("a", encoding="utf-8")
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends: `sync` skips locked journals
                os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)  # drops the partial line of a killed process
            except BlockingIOError:
                raise
            except OSError as error:
                self._disable(error)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """`values` at `step`; without a step they describe the whole run."""
        self.write("metrics", values={name: float(value) for name, value in values.items()}, step=step)

    def headline(self, values: Mapping[str, float], text: str) -> None:
        """Metrics and Markdown description of the parent run, as the table of runs shows them."""
        self.write("headline", values=dict(values), text=text)

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters of the run, nested mappings as dotted names. Once set, a value cannot change."""
        self.write("params", values={name: str(value) for name, value in flatten(values)})

    def artifact(self, path: Path) -> None:
        """Figure, small table or folder, copied so that later edits do not reach MLflow; weights stay with DVC."""
        if self._file is None or self._journal is None:
            return
        copy = self._journal.with_suffix(".files") / path.name
        try:
            copy.parent.mkdir(exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, copy, dirs_exist_ok=True)
            else:
                shutil.copy2(path, copy)
        except OSError as error:
            warn(f"{path} is not tracked: {error}")
        else:
            self.write("artifact", path=str(copy.relative_to(self._journal.parent)))

    def dataset(self, name: str, digest: str, source: str = "manifest") -> None:
        """Input data set. `source` of the digest: "dvc", or the data's own "manifest"."""
        self.write("dataset", name=name, digest=digest, source=source)

    def tag(self, key: str, value: str) -> None:
        self.write("tag", key=key, value=str(value))

    def link(self, key: str, run: str | None, path: str = "", md5: str = "") -> None:
        """Tag that names another run: that of journal `run`, or if None the one that wrote `path` with this `md5`."""
        if run or md5:
            self.write("link", key=key, run=run, path=path, md5=md5)

    def made(self, path: str, digest: provenance.Digest) -> None:
        """Output of the stage with DVC's digest."""
        self.write("made", path=path, md5=digest.md5, files=digest.files)

    def origin(self, params: Mapping[str, str], uncommitted: Sequence[str]) -> None:
        """Inputs of a rerun beside the commit: the text of params/, and the uncommitted files of code."""
        self.write("origin", params=dict(params), uncommitted=list(uncommitted))

    def end(self, status: str) -> None:
        self.write("end", status=status)
        if self._file is not None:
            self._file.close()

    def write(self, event: str, **fields: Any) -> None:
        """One event; the methods above write those of a stage's own."""
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(json.dumps({"event": event, "time": _now_ms(), **fields}) + "\n")
                self._file.flush()
            except OSError as error:
                self._disable(error)

    def _disable(self, error: OSError) -> None:
        warn(f"this run is not tracked: {error}")
        self._file = None


def record(
    key: str,
    name: str,
    *,
    runtime: RuntimeSettings,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Sequence[Path] = (),
) -> None:
    """Write the complete journal of a run over existing results, unless `key` has one; `alignti sync` or the caller sends
    it."""
    journal = JOURNALS / f"{key}.jsonl"
    if journal.exists():
        return
    start = {"name": name, "experiment": runtime.experiment, "parent": None, "tags": {**provenance.commit_tags(), **tags}}
    events: list[dict[str, Any]] = [
        {"event": "start", **start},
        {"event": "params", "values": {name: str(value) for name, value in flatten(params)}},
        {"event": "metrics", "values": {k: float(v) for k, v in metrics.items()}, "step": None},
    ]
    files = journal.with_suffix(".files")
    for path in artifacts:
        files.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, files / path.name)
        events.append({"event": "artifact", "path": f"{files.name}/{path.name}"})
    _append(journal, events)


def renew(key: str, among: str) -> None:
    """Tag run `key` as recorded now if one of pattern `among` is newer: its results are the current ones again."""
    journal = JOURNALS / f"{key}.jsonl"
    written = journal.stat().st_mtime_ns
    if any(other.stat().st_mtime_ns > written for other in JOURNALS.glob(f"{among}.jsonl")):
        _append(journal, [{"event": "tag", "key": RECORDED, "value": str(_now_ms())}])


def register(key: str, **student: Any) -> bool:
    """Append the `register` event of run `key` (read by `mlflow_registry.py`); False if the journal has one since `renew`."""
    journal = JOURNALS / f"{key}.jsonl"
    if '"event": "register"' in journal.read_text(encoding="utf-8").rpartition(f'"key": "{RECORDED}"')[2]:
        return False
    _append(journal, [{"event": "register", **student}])
    return True


def _append(journal: Path, events: Sequence[Mapping[str, Any]]) -> None:
    existing = journal.read_text(encoding="utf-8") if journal.exists() else ""
    lines = [json.dumps({"time": _now_ms(), **event}) + "\n" for event in (*events, {"event": "end", "status": "FINISHED"})]
    write_text(journal, existing + "".join(lines))


def events(journal: Path) -> list[dict[str, Any]]:
    """Events of a journal. Raises DataError for a malformed line."""
    return events_from(journal, 0)[0]


def events_from(journal: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Events from byte `offset` on, and the byte where they end. A partial last line is skipped: it is still being written, or
    was cut off by a crash. Raises DataError for a malformed line."""
    with journal.open("rb") as file:
        file.seek(offset)
        data = file.read()
    complete = data[: data.rfind(b"\n") + 1]
    return [_event(journal, line) for line in complete.splitlines()], offset + len(complete)


def first_event(journal: Path) -> dict[str, Any]:
    """First event of a journal. Raises DataError if it is malformed."""
    with journal.open("rb") as lines:
        return _event(journal, lines.readline())


def _event(journal: Path, line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        raise DataError(f"{journal} holds a line that is no event: damaged; delete it, and that run is not sent") from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def warn(message: str, stream: IO[str] | None = None) -> None:
    """One line on stderr, without secrets."""
    print("tracking: " + redact(message), file=stream or sys.stderr, flush=True)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
