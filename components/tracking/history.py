"""Facts about earlier runs, read from their journals and from the records of last runs."""

from __future__ import annotations

import json
import subprocess
from typing import Any, NamedTuple

from components.records.paths import RUNS
from components.records.record import content, parsed
from components.tracking import provenance, system_metrics
from components.tracking.journal import JOURNALS, events

LAST = RUNS / "last"  # one record per stage x cell: its last run that succeeded


def sent(run: str) -> dict[str, Any] | None:
    """What the mirror noted of this journal: `run_id` and `experiment` in MLflow, `done`; None before it has begun."""
    path = JOURNALS / f"{run}.sent"
    return parsed(path) if path.exists() else None


def energy(run: str) -> dict[str, float]:
    """What the run of this journal took, in Wh, as far as that was measured, and here: `usage/gpu_wh`, `usage/cpu_wh`.

    A run that went on after it was stopped has told more than once; its attempts are added up.
    """
    journal = JOURNALS / f"{run}.jsonl"
    used: dict[str, float] = {}
    for event in events(journal) if journal.exists() else ():
        if event["event"] == "metrics" and event["step"] is None:
            for name in {system_metrics.GPU_WH, system_metrics.CPU_WH} & set(event["values"]):
                used[name] = used.get(name, 0.0) + event["values"][name]
    return used


def ran(run: str) -> tuple[str | None, list[str]]:
    """The commit that the run of this journal ran, None if that is not known, and the files, of params/ too, that were not
    as that commit has them."""
    journal = JOURNALS / f"{run}.jsonl"
    told = [event for event in (events(journal) if journal.exists() else ()) if event["event"] in ("start", "origin")]
    commits = [event["tags"].get("mlflow.source.git.commit", "none") for event in told if "tags" in event]
    commit = commits[-1] if commits else "none"
    if commit == "none":
        return None, []
    changed = [file for event in told for file in event.get("uncommitted", ())]
    for file, text in told[-1].get("params", {}).items():
        try:
            same = provenance.git("show", f"{commit}:{file}") == text.strip()
        except (OSError, subprocess.CalledProcessError):
            same = False  # a file, or a commit, that is not here
        changed += [] if same else [file]
    return commit, sorted(set(changed))


class Told(NamedTuple):
    """A run as a list shows it."""

    began: int  # ms since the epoch; 0 where its journal cannot be read
    name: str  # name of its journal
    status: str
    recipe: str | None
    commit: str


def recorded() -> list[Told]:
    """Every run that was journalled here, in order of their starts; one whose end is not told is `open`."""
    found = []
    for journal in JOURNALS.glob("*.jsonl"):
        lines = content(journal).splitlines()
        if not lines:
            continue  # its process was killed before it wrote a word
        try:
            start, tags = json.loads(lines[0])["time"], json.loads(lines[0])["tags"]
            status = json.loads(lines[-1])["status"] if b'"event": "end"' in lines[-1] else "open"
        except (ValueError, KeyError):
            start, tags, status = 0, {}, "unreadable"
        found.append(Told(start, journal.stem, status, tags.get("recipe"), tags.get("mlflow.source.git.commit", "none")))
    return sorted(found)


def last_run(stage: str) -> str | None:
    """The journal of the run that last made this stage's outputs here, None if none did."""
    path = LAST / f"{stage}.json"
    return str(parsed(path)["run"]) if path.exists() else None


def last_seconds(stage: str) -> tuple[float, str | None] | None:
    """How long `stage` took when it last ran, and the recipe that `params/` were nearest to; None if it never did."""
    path = LAST / f"{stage}.json"
    if not path.exists():
        return None
    record = parsed(path)
    return float(record["seconds"]), record["recipe"]
