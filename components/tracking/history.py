"""Facts about earlier runs, from their journals and the records of last runs."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from pydantic import ConfigDict

from components.errors import DataError
from components.process import is_free
from components.records.paths import RUNS
from components.records.record import Record, content, parsed
from components.tracking import provenance, system_metrics
from components.tracking.journal import JOURNALS, events

LAST = RUNS / "last"  # one record per stage x cell: its last run that succeeded


def sync_state(run: str) -> dict[str, Any] | None:
    """Sync state of this journal: `run_id` and `experiment` in MLflow, `done`; None before the sync has started."""
    path = JOURNALS / f"{run}.sent"
    return parsed(path) if path.exists() else None


def energy(run: str) -> dict[str, float]:
    """Measured energy of this journal's run, `usage/gpu_wh` and `usage/cpu_wh`, as far as counters and the journal are here."""
    return {name: wh for name, wh in used(run).items() if name in (system_metrics.GPU_WH, system_metrics.CPU_WH)}


def used(run: str) -> dict[str, float]:
    """Last `usage/` values of this journal's run: over all of its attempts that ended otherwise than by a kill."""
    values: dict[str, float] = {}
    for event in _events(run):
        if event["event"] == "metrics" and event["step"] is None:
            values |= {name: value for name, value in event["values"].items() if name.startswith("usage/")}
    return values


def ran(run: str) -> tuple[str | None, list[str]]:
    """Commit of this journal's run, None if unknown, and the files (params/ included) that differed from it."""
    origins = [event for event in _events(run) if event["event"] in ("start", "origin")]
    commits = [event["tags"].get("mlflow.source.git.commit", "none") for event in origins if "tags" in event]
    commit = commits[-1] if commits else "none"
    if commit == "none":
        return None, []
    changed_files = [file for event in origins for file in event.get("uncommitted", ())]
    params = origins[-1].get("params", {})
    changed_files += [file for file, text in params.items() if provenance.git("show", f"{commit}:{file}") != text.strip()]
    return commit, sorted(set(changed_files))


def tags(run: str) -> dict[str, str]:
    """Tags of this journal's run at its start; none if the journal is not here."""
    tags: dict[str, str] = next(iter(_events(run)), {}).get("tags", {})
    return tags


def _events(run: str) -> list[dict[str, Any]]:
    journal = JOURNALS / f"{run}.jsonl"
    return events(journal) if journal.exists() else []


class RecordedRun(NamedTuple):
    """Entry in the list of runs."""

    started: int  # ms since the epoch; 0 for an unreadable journal
    name: str  # name of its journal
    status: str
    recipe: str | None
    commit: str


def recorded() -> list[RecordedRun]:
    """All runs journalled here, by start time; without an end event, status `open`, or `KILLED` if no process writes it."""
    runs = []
    for journal in JOURNALS.glob("*.jsonl"):
        lines = content(journal).splitlines()
        if not lines:
            continue  # process killed before its first line
        try:
            start, tags = json.loads(lines[0])["time"], json.loads(lines[0])["tags"]
            has_end = b'"event": "end"' in lines[-1]
            status = json.loads(lines[-1])["status"] if has_end else "KILLED" if is_free(journal) else "open"
        except (ValueError, KeyError):
            start, tags, status = 0, {}, "unreadable"
        runs.append(RecordedRun(start, journal.stem, status, tags.get("recipe"), tags.get("mlflow.source.git.commit", "none")))
    return sorted(runs)


class LastRun(Record):
    """.runs/last/STAGE.json: last successful run of a stage here."""

    model_config = ConfigDict(extra="ignore", frozen=True)  # commits, for people

    run: str  # name of its journal
    seconds: float
    recipe: str | None  # nearest to params/


def last(stage: str) -> LastRun | None:
    """Last successful run of this stage here. Raises DataError if its record is damaged."""
    path = LAST / f"{stage}.json"
    try:
        return LastRun.read(path) if path.exists() else None
    except DataError:
        raise DataError(f"{path} is damaged; delete it: it tells how long {stage} took, and nothing depends on it") from None
