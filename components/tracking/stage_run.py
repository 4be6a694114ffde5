"""Tracked run of one stage: opened or resumed in its journal, metered, linked to the stage's inputs and outputs.

A stage that was stopped or failed resumes its journal, and so its MLflow run, if nothing that decides its result has changed
since; otherwise it opens a new run, linked to the old one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from components.config.runtime import RuntimeSettings
from components.errors import AlignTIError, DataError, Interrupted
from components.io import write_text
from components.process import is_free, runs_module
from components.records.paths import RUNS
from components.records.record import parsed
from components.tracking import history, provenance, system_metrics
from components.tracking.journal import JOURNALS, Run, events, warn

UNFINISHED = RUNS / "unfinished"  # one record per stage x cell whose last run did not finish
PARENT = "ALIGNTI_PARENT_RUN_ID"  # an MLflow run id, or the id of a journal
JOURNAL_ONLY = "journal"  # tracking_uri without MLflow
LOST = "if this run is stopped, the next does not go on in its MLflow run"  # without its record in UNFINISHED
PATIENCE_S = 10  # seconds that a finished stage waits for its journal to be sent
SENT, NOT_SENT_WARNED = 0, 3  # exit codes of the sync process


@contextlib.contextmanager
def stage_run(
    stage: str,
    cell: str | None = None,
    *,
    runtime: RuntimeSettings,
    params: Mapping[str, Any] | None = None,
    metered: bool = True,
) -> Iterator[Run]:
    """Track one stage (and cell: `distill`, `align_ti`) on rank 0; on other ranks the run is a no-op.

    `metered`: sample what the stage uses of the machine; a flow uses nothing itself, its stages do.

    The parent run is that of $ALIGNTI_PARENT_RUN_ID, else one per enclosing `dvc` process, else none.
    """
    os.environ.pop("MLFLOW_RUN_ID", None)  # it would make MLflow reopen and rename that run
    if os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1":  # RANK alone belongs to another job
        yield Run(None)
        return
    name = f"{stage}@{cell}" if cell else stage
    dvc_name = os.environ.get("DVC_STAGE", name)
    lineage = _read_lineage(dvc_name)
    nearest = nearest_recipe()
    title = cell or (None if metered else nearest.name)
    run, elapsed, previous = _open(name, dvc_name, lineage)
    if elapsed is None:
        provenance.warn_without_commit()
        run.write(
            "start",
            name=f"{stage}/{title}" if title else stage,
            experiment=runtime.experiment,
            parent=_parent(nearest),
            tags={
                "stage": stage,
                "host": socket.gethostname(),
                **({"cell": cell} if cell else {}),
                **nearest.tag,
                **provenance.commit_tags(),
            },
        )
        run.link("resumed_from", previous)
    run.params(params or {})
    if lineage is not None:
        run.origin(lineage.params, provenance.uncommitted())
        for path, md5 in lineage.inputs.items():
            run.dataset(path, md5, source="dvc")
    journal = JOURNALS / f"{run.id}.jsonl"
    trackers = runtime.trackers if journal.exists() else ()
    senders = [_start(["components.tracking.also", tracker, str(journal)], runtime, journal) for tracker in trackers]
    if not (metered and elapsed is None and _is_followed()):
        senders.append(_start_mirror([journal], runtime, *(() if metered else ("--below", run.id))))
    used = history.used(run.id) if elapsed else {}  # none of a damaged journal either
    began = time.monotonic()
    status = "FAILED"
    try:
        with system_metrics.metered(run, runtime, used) if metered else contextlib.nullcontext():
            yield run
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        seconds = time.monotonic() - began + (elapsed or 0.0)
        run.metrics({"seconds": seconds, **_cost(seconds, runtime, metered, used)})
        if status == "FINISHED" and lineage is not None:
            _record_outputs(run, lineage)
        run.end(status)
        if status == "FINISHED":
            last = {"run": run.id, "seconds": round(seconds, 3), "recipe": nearest.name, **provenance.commit_tags()}
            _write_note(history.LAST / f"{dvc_name}.json", last, f"how long {dvc_name} took is not recorded")
            _forget_unfinished(dvc_name, run.id)
        for sender in senders:
            _finish_mirror(sender, journal)


def send(names: Sequence[str], runtime: RuntimeSettings) -> None:
    """Send finished journals by a sync process, as at the end of a stage."""
    journals = [JOURNALS / f"{name}.jsonl" for name in names]
    if journals:
        _finish_mirror(_start_mirror(journals, runtime), journals[0])


class NearestRecipe(NamedTuple):
    """Recipe nearest to `params/` at a run's start."""

    name: str | None
    tag: dict[str, str]  # tags for the table of runs


def nearest_recipe() -> NearestRecipe:
    from components.config.recipes import nearest

    try:
        name, differing = nearest()
    except (OSError, AlignTIError):  # missing or invalid params/: reported by the stage
        return NearestRecipe(None, {})
    if name is None:
        return NearestRecipe(None, {})
    return NearestRecipe(name, {"recipe": f"{name} with {differing} value(s) changed" if differing else name})


@dataclass(frozen=True)
class _Lineage:
    """Declaration, fingerprint, inputs and params of a stage of dvc.yaml at its start."""

    declaration: provenance.Declaration
    fingerprint: str
    inputs: dict[str, str]  # path -> md5
    params: dict[str, str]  # file -> text


def _read_lineage(stage: str) -> _Lineage | None:
    """Lineage of a stage of dvc.yaml, None for any other. A fault costs a warning, and the run has no lineage."""
    try:
        declaration = provenance.Declaration.read(stage)
        if declaration is None:
            return None
        return _Lineage(declaration, declaration.fingerprint(), declaration.inputs(), provenance.params())
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        warn(f"what {stage} reads and makes is not tracked: {type(error).__name__}: {error}")
        return None


def _open(name: str, stage: str, lineage: _Lineage | None) -> tuple[Run, float | None, str | None]:
    """Opens or resumes the stage's run. Returns it, seconds so far if resumed, else the id of the run that it replaces."""
    note = UNFINISHED / f"{stage}.json"
    last = _read_note(note) if lineage else None
    if lineage and last and last["fingerprint"] == lineage.fingerprint and (JOURNALS / f"{last['run']}.jsonl").exists():
        journal, attempt = JOURNALS / f"{last['run']}.jsonl", last["attempt"] + 1
        try:
            run = Run(journal)
        except BlockingIOError:
            last = None  # it is running, in another workspace
        else:
            elapsed = _seconds(journal)
            run.write("resume", attempt=attempt, host=socket.gethostname())
            _write_note(note, {**last, "attempt": attempt}, LOST)
            return run, elapsed, None
    run = Run(JOURNALS / f"{time.strftime('%Y%m%dT%H%M%S')}-{name}-{uuid.uuid4().hex[:8]}.jsonl")
    if lineage:
        _write_note(note, {"run": run.id, "fingerprint": lineage.fingerprint, "attempt": 1}, LOST)
    return run, None, last["run"] if last else None


def _forget_unfinished(stage: str, run: str) -> None:
    note = UNFINISHED / f"{stage}.json"
    if (_read_note(note) or {}).get("run") == run:
        note.unlink(missing_ok=True)


def _read_note(note: Path) -> dict[str, Any] | None:
    """Record of an unfinished run; None if missing or damaged, which costs no more than a new run."""
    try:
        return parsed(note) if note.exists() else None
    except DataError as error:
        warn(str(error))
        return None


def _write_note(note: Path, content: Mapping[str, Any], consequence: str) -> None:
    """Write a record that no stage depends on; a disk that refuses it costs a warning with the `consequence`."""
    try:
        write_text(note, json.dumps(content) + "\n")
    except OSError as error:
        warn(f"{note}: {error}; {consequence}")


def _seconds(journal: Path) -> float:
    """Total seconds of the processes that wrote `journal`, each from its first line to its last."""
    total, first, last = 0, 0, 0
    try:
        lines = events(journal)
    except DataError as error:
        warn(str(error))
        return 0.0
    for line in lines:
        if line["event"] in ("start", "resume"):
            total, first = total + last - first, line["time"]
        last = line["time"]
    return (total + last - first) / 1000


def _record_outputs(run: Run, lineage: _Lineage) -> None:
    """Write each output's md5 to the journal and to `.runs/made`."""
    for out in lineage.declaration.outs:
        try:
            digest = provenance.digest(Path(out))
            run.made(out, digest)
            provenance.note_maker(digest.md5, run.id)
        except OSError as error:
            warn(f"{out}: what this run made is not noted: {error}")


def _cost(seconds: float, runtime: RuntimeSettings, metered: bool, used: Mapping[str, float]) -> dict[str, float]:
    """CPU hours, child processes and those `used` before included, and hours of the stage's devices."""
    times = os.times()
    cpu = times.user + times.system + times.children_user + times.children_system
    hours = {system_metrics.CPU_HOURS: cpu / 3600 + used.get(system_metrics.CPU_HOURS, 0.0)}
    if metered:
        hours[system_metrics.DEVICE_HOURS] = runtime.devices * seconds / 3600
    return hours


def _parent(nearest: NearestRecipe) -> dict[str, Any] | None:
    if parent := os.environ.get(PARENT):
        return {"id": parent, "name": "pipeline", "ends_with_stages": False, "tags": nearest.tag}
    if "DVC_STAGE" not in os.environ:
        return None
    import psutil  # a dependency of DVC

    for process in psutil.Process().parents():
        try:
            command = process.cmdline()
        except psutil.Error:  # another user's, or ended meanwhile
            continue
        if runs_module(command, "dvc"):
            started = int(process.create_time() * 1000)
            label = time.strftime("dvc repro %Y-%m-%d %H:%M:%S", time.localtime(started / 1000))
            return {
                "id": f"dvc-{socket.gethostname()}-{process.pid}-{started}",
                "name": f"{nearest.name}: {label}" if nearest.name else label,
                "ends_with_stages": True,
                "tags": nearest.tag,
            }
    return None


def _is_followed() -> bool:
    """Whether the parent flow is running and journalled here: its sync process then sends this journal too."""
    parent = JOURNALS / f"{os.environ.get(PARENT)}.jsonl"
    return parent.exists() and not is_free(parent)


def _start_mirror(journals: Sequence[Path], runtime: RuntimeSettings, *options: str) -> subprocess.Popen[bytes] | None:
    if runtime.tracking_uri == JOURNAL_ONLY or not journals[0].exists():
        return None
    return _start(["components.tracking.mlflow_sync", *map(str, journals), *options], runtime, journals[0])


def _start(module: list[str], runtime: RuntimeSettings, journal: Path) -> subprocess.Popen[bytes] | None:
    # The address travels in the environment: it may hold a password, and command lines are public.
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "ALIGNTI_TRACKING_URI": runtime.tracking_uri,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,  # independent of the working directory
    }
    try:
        command = [sys.executable, "-m", *module]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    except OSError as error:
        warn(f"cannot start {module[0]}, which sends {journal} ({error}); `alignti sync` sends it to MLflow later")
        return None


def _finish_mirror(mirror: subprocess.Popen[bytes] | None, journal: Path) -> None:
    """Closes the stdin of the sync process, which marks the journal complete; it may send the rest after the stage."""
    if mirror is None or mirror.stdin is None:
        return
    mirror.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        if mirror.wait(PATIENCE_S) not in (SENT, NOT_SENT_WARNED):
            warn(f"what sends {journal} to MLflow failed with exit code {mirror.returncode}; `alignti sync` sends it later")
