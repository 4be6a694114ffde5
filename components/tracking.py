"""What happened: each stage run keeps a journal under `.runs/journal/`, and a process of its own sends it to MLflow.

The journal comes first and is all that the work waits for, so a tracking server that is away, slow or broken costs one
warning, never a training: `alignti sync` sends what is left. `components/mirror.py` is the sending side.

Lines of a journal are JSON objects with `event` and `time` (ms): start, resume, origin, params, metrics, artifact, dataset,
tag, link (to another run), made, register, end.

A stage that was stopped or failed goes on in its journal, and so in its MLflow run, if nothing that decides its result has
changed since; else it opens a run that is linked to that one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml

from components import lineage, meter
from components.artifacts import RUNS, write_text
from components.errors import AlignTIError, Interrupted
from components.redact import redacted
from components.settings import RuntimeSettings

JOURNALS = RUNS / "journal"
LAST = RUNS / "last"  # one record per stage x cell: its last run that succeeded
UNFINISHED = RUNS / "unfinished"  # one record per stage x cell whose last run did not
PARENT = "ALIGNTI_PARENT_RUN_ID"  # an MLflow run id, or the id of a journal
JOURNAL_ONLY = "journal"  # the tracking_uri that asks for no MLflow
PATIENCE_S = 10  # how long a finished stage waits for its journal to be sent
SENT, NOT_SENT_AND_SAID_SO = 0, 3  # exit codes of the process that sends it


class Run:
    """One run being journalled. No method raises on a tracking fault; with `journal` None each does nothing."""

    def __init__(self, journal: Path | None) -> None:
        """A journal that is there already is gone on with. Raises BlockingIOError if another process is writing it."""
        self.id = journal.stem if journal else ""
        self._journal = journal
        self._file: IO[str] | None = None
        self._lock = threading.Lock()  # the meter's thread writes too
        self._latest: dict[str, float] = {}
        self._best: dict[str, float] = {}
        if journal is not None:
            try:
                journal.parent.mkdir(parents=True, exist_ok=True)
                self._file = journal.open("a", encoding="utf-8")
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held while we live: how `sync` knows that we do
                self._take_up(journal)
            except BlockingIOError:
                raise
            except OSError as error:
                self._stop(error)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """`values` at `step`; without a step they describe the whole run. Stepped ones end as `final/` and `best/` too:
        best is the lowest for names under `loss/`, else the highest."""
        told = {name: float(value) for name, value in values.items()}
        self._write("metrics", values=told, step=step)
        if step is not None:
            self._note(told)

    def sample(self, values: Mapping[str, float], step: int) -> None:
        """Metrics without a best and a final one: what the machine does."""
        self._write("metrics", values=dict(values), step=step)

    def params(self, values: Mapping[str, Any]) -> None:
        """What was asked for, nested mappings as dotted names. Once set, a value cannot change."""
        self._write("params", values={name: str(value) for name, value in flatten(values)})

    def artifact(self, path: Path) -> None:
        """A picture or a small table. It is copied, so that what is sent later is what was there now; weights stay with DVC."""
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
            self._write("artifact", path=str(copy.relative_to(self._journal.parent)))

    def dataset(self, name: str, digest: str, source: str = "manifest") -> None:
        """`source`: whose digest it is, "dvc" or that of the data's own manifest."""
        self._write("dataset", name=name, digest=digest, source=source)

    def tag(self, key: str, value: str) -> None:
        self._write("tag", key=key, value=str(value))

    def link(self, key: str, run: str | None, path: str = "", md5: str = "") -> None:
        """A tag that names another run: that of the journal `run`, or, if none is known here, the one that made `path`."""
        if run or md5:
            self._write("link", key=key, run=run, path=path, md5=md5)

    def made(self, path: str, digest: lineage.Digest) -> None:
        """What the stage wrote, as DVC will know it."""
        self._write("made", path=path, md5=digest.md5, files=digest.files)

    def origin(self, params: Mapping[str, str], uncommitted: Sequence[str]) -> None:
        """What a rerun needs beside the commit: the text of params/, and which code was not committed."""
        self._write("origin", params=dict(params), uncommitted=list(uncommitted))

    def resume(self, attempt: int, **fields: Any) -> None:
        self._write("resume", attempt=attempt, **fields)

    def start(self, **fields: Any) -> None:
        self._write("start", **fields)

    def end(self, status: str) -> None:
        summary = {f"final/{k}": v for k, v in self._latest.items()} | {f"best/{k}": v for k, v in self._best.items()}
        if summary:
            self._write("metrics", values=summary, step=None)
        self._write("end", status=status)
        if self._file is not None:
            self._file.close()

    def _take_up(self, journal: Path) -> None:
        """Of an earlier process that was stopped: its values count for `best/` and `final/`; half a line of it is cut off."""
        text = journal.read_bytes()
        whole = text.rfind(b"\n") + 1
        os.truncate(journal, whole)
        for line in map(json.loads, text[:whole].splitlines()):
            if line["event"] == "metrics" and line["step"] is not None:
                self._note(line["values"])

    def _note(self, values: Mapping[str, float]) -> None:
        self._latest |= values
        for name, value in values.items():
            better = min if name.startswith("loss/") else max
            self._best[name] = better(value, self._best.get(name, value))

    def _write(self, event: str, **fields: Any) -> None:
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(json.dumps({"event": event, "time": _now_ms(), **fields}) + "\n")
                self._file.flush()
            except OSError as error:
                self._stop(error)

    def _stop(self, error: OSError) -> None:
        warn(f"this run is not tracked: {error}")
        self._file = None


@contextlib.contextmanager
def stage_run(
    stage: str,
    cell: str | None = None,
    *,
    runtime: RuntimeSettings,
    params: Mapping[str, Any] | None = None,
    works: bool = True,
) -> Iterator[Run]:
    """Track one stage (and cell: `distill`, `align_ti`) on rank 0; elsewhere the run given does nothing.

    `works`: it uses the machine itself, which is metered; a flow does not, its stages do.

    The run's parent is the one that $ALIGNTI_PARENT_RUN_ID names, else one per enclosing `dvc` process, else none.
    """
    os.environ.pop("MLFLOW_RUN_ID", None)  # it would make MLflow reopen and rename that run
    if os.environ.get("RANK", "0") != "0":
        yield Run(None)
        return
    name = f"{stage}@{cell}" if cell else stage
    known_as = os.environ.get("DVC_STAGE", name)
    of = _read_lineage(known_as)
    nearest = nearest_recipe()
    run, spent, before = _open(name, known_as, of)
    if spent is None:
        run.start(
            name=f"{stage}/{cell}" if cell else stage,
            experiment=runtime.experiment,
            parent=_parent(),
            tags={"stage": stage, "host": socket.gethostname(), **({"cell": cell} if cell else {}), **nearest.tag, **_origin()},
        )
        run.link("resumed_from", before)
    run.params(params or {})
    if of is not None:
        run.origin(of.params, _uncommitted())
        for path, md5 in of.inputs.items():
            run.dataset(path, md5, source="dvc")
    journal = JOURNALS / f"{run.id}.jsonl"
    mirror = _start_mirror(journal, runtime)
    began = time.monotonic()
    status = "FAILED"
    try:
        with meter.metered(run, runtime, warn) if works else contextlib.nullcontext():
            yield run
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        seconds = time.monotonic() - began + (spent or 0.0)
        run.metrics({"seconds": seconds, **_cost(seconds, runtime, works)})
        if status == "FINISHED" and of is not None:
            _note_made(run, of)
        run.end(status)
        if status == "FINISHED":
            _remember(known_as, run.id, seconds, nearest.name)
            _forget_unfinished(known_as, run.id)
        _finish_mirror(mirror, journal)


def record(
    key: str,
    name: str,
    *,
    runtime: RuntimeSettings,
    parent: str | None,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Sequence[Path] = (),
    registers: Mapping[str, Any] | None = None,
) -> bool:
    """Journal, whole and at once, a run that says what lies there already; `alignti sync` or the caller sends it.

    `registers`: the student, as `components/registry.py` takes it. False if `key`, which names what lies there, was journalled
    before: nothing is told twice.
    """
    journal = JOURNALS / f"{key}.jsonl"
    if journal.exists():
        return False
    above = {"id": parent, "name": "study", "ends_with_stages": False} if parent else None
    start = {"name": name, "experiment": runtime.experiment, "parent": above, "tags": {**tags, **_origin()}}
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
    if registers:
        events.append({"event": "register", **registers})
    events.append({"event": "end", "status": "FINISHED"})
    write_text(journal, "".join(json.dumps({"time": _now_ms(), **event}) + "\n" for event in events))
    return True


def sent(run: str) -> dict[str, Any] | None:
    """What the mirror noted of this journal: `run_id` and `experiment` in MLflow, `done`; None before it has begun."""
    try:
        return dict(json.loads((JOURNALS / f"{run}.sent").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def energy(run: str) -> dict[str, float]:
    """What the run of this journal took, in Wh, as far as that was measured, and here: `cost/gpu_wh`, `cost/cpu_wh`.

    A run that went on after it was stopped has told more than once; its attempts are added up.
    """
    try:
        lines = (JOURNALS / f"{run}.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    used: dict[str, float] = {}
    for event in map(json.loads, lines):
        if event["event"] == "metrics" and event["step"] is None:
            for name in {meter.GPU_WH, meter.CPU_WH} & set(event["values"]):
                used[name] = used.get(name, 0.0) + event["values"][name]
    return used


def ran(run: str) -> tuple[str | None, list[str]]:
    """The commit that the run of this journal ran, None if that is not known, and the files, of params/ too, that were not
    as that commit has them."""
    try:
        lines = (JOURNALS / f"{run}.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None, []
    events = [event for event in map(json.loads, lines) if event["event"] in ("start", "origin")]
    commits = [event["tags"].get("mlflow.source.git.commit", "none") for event in events if "tags" in event]
    commit = commits[-1] if commits else "none"
    if commit == "none":
        return None, []
    changed = [file for event in events for file in event.get("uncommitted", ())]
    for file, text in events[-1].get("params", {}).items():
        try:
            same = _git("show", f"{commit}:{file}") == text.strip()
        except (OSError, subprocess.CalledProcessError):
            same = False  # a file, or a commit, that is not here
        changed += [] if same else [file]
    return commit, sorted(set(changed))


class Told(NamedTuple):
    """A run as a list shows it."""

    name: str  # of its journal
    status: str
    recipe: str | None
    commit: str


def recorded() -> list[Told]:
    """Every run that was journalled here, in order of time; one whose end is not told is `open`."""
    found = []
    for journal in sorted(JOURNALS.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        lines = journal.read_text(encoding="utf-8").splitlines()
        if not lines:
            continue  # its process was killed before it wrote a word
        tags = json.loads(lines[0])["tags"]
        status = json.loads(lines[-1])["status"] if '"event": "end"' in lines[-1] else "open"
        found.append(Told(journal.stem, status, tags.get("recipe"), tags.get("mlflow.source.git.commit", "none")))
    return found


def last_run(stage: str) -> str | None:
    """The journal of the run that last made this stage's outputs here, None if none did."""
    try:
        return str(json.loads((LAST / f"{stage}.json").read_text(encoding="utf-8"))["run"])
    except FileNotFoundError:
        return None


def last_seconds(stage: str) -> tuple[float, str | None] | None:
    """How long `stage` took when it last ran, and the recipe that `params/` were nearest to; None if it never did."""
    try:
        record = json.loads((LAST / f"{stage}.json").read_text(encoding="utf-8"))
        return float(record["seconds"]), record["recipe"]
    except FileNotFoundError:
        return None


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class NearestRecipe(NamedTuple):
    """The recipe that `params/` are nearest to at a run's start."""

    name: str | None
    tag: dict[str, str]  # for the table of runs


def nearest_recipe() -> NearestRecipe:
    from components.recipes import nearest

    try:
        name, differing = nearest()
    except (OSError, AlignTIError):  # no params/ here, or edited meanwhile: the stage itself says so
        return NearestRecipe(None, {})
    if name is None:
        return NearestRecipe(None, {})
    return NearestRecipe(name, {"recipe": f"{name} with {differing} value(s) changed" if differing else name})


def warn(message: str, to: IO[str] | None = None) -> None:
    """One line on stderr, without secrets."""
    print("tracking: " + redacted(message), file=to or sys.stderr, flush=True)


def _remember(stage: str, run: str, seconds: float, recipe: str | None) -> None:
    """The record that `alignti plan` estimates from. No stage depends on it."""
    record = {"run": run, "seconds": round(seconds, 3), "recipe": recipe, **_origin()}
    try:
        write_text(LAST / f"{stage}.json", json.dumps(record, indent=2) + "\n")
    except OSError as error:
        warn(f"how long {stage} took is not recorded: {error}")


@dataclass(frozen=True)
class _Lineage:
    """A stage of dvc.yaml at its start."""

    declared: lineage.Declared
    fingerprint: str
    inputs: dict[str, str]  # path -> md5
    params: dict[str, str]  # file -> text


def _read_lineage(stage: str) -> _Lineage | None:
    """None for what is no stage of dvc.yaml. A fault costs a warning: that run is not tied to its bytes."""
    try:
        declared = lineage.Declared.read(stage)
        if declared is None:
            return None
        return _Lineage(declared, declared.fingerprint(), declared.inputs(), lineage.params())
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        warn(f"what {stage} reads and makes is not tracked: {type(error).__name__}: {error}")
        return None


def _open(name: str, stage: str, of: _Lineage | None) -> tuple[Run, float | None, str | None]:
    """The run of this process; the seconds it took so far, if it goes on with one that was stopped; else which one that is."""
    note = UNFINISHED / f"{stage}.json"
    before = json.loads(note.read_text(encoding="utf-8")) if of and note.exists() else None
    if of and before and before["fingerprint"] == of.fingerprint and (JOURNALS / f"{before['run']}.jsonl").exists():
        journal, attempt = JOURNALS / f"{before['run']}.jsonl", before["attempt"] + 1
        try:
            run = Run(journal)
        except BlockingIOError:
            before = None  # it lives, in another workspace
        else:
            spent = _seconds(journal)
            run.resume(attempt, host=socket.gethostname())
            _write_note(note, {**before, "attempt": attempt})
            return run, spent, None
    run = Run(JOURNALS / f"{time.strftime('%Y%m%dT%H%M%S')}-{name}-{uuid.uuid4().hex[:8]}.jsonl")
    if of:
        _write_note(note, {"run": run.id, "fingerprint": of.fingerprint, "attempt": 1})
    return run, None, before and before["run"]


def _forget_unfinished(stage: str, run: str) -> None:
    note = UNFINISHED / f"{stage}.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8"))["run"] == run:
        note.unlink(missing_ok=True)


def _write_note(note: Path, content: Mapping[str, Any]) -> None:
    try:
        write_text(note, json.dumps(content) + "\n")
    except OSError as error:
        warn(f"{note}: {error}; if this run is stopped, the next does not go on in its MLflow run")


def _seconds(journal: Path) -> float:
    """What the processes took that wrote to `journal`, each from its first line to its last."""
    total, first, last = 0, 0, 0
    for text in journal.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["event"] in ("start", "resume"):
            total, first = total + last - first, line["time"]
        last = line["time"]
    return (total + last - first) / 1000


def _note_made(run: Run, of: _Lineage) -> None:
    """Each output's md5, in the journal and in `.runs/made`."""
    for out in of.declared.outs:
        try:
            found = lineage.digest(Path(out))
            run.made(out, found)
            lineage.note_maker(found.md5, run.id)
        except OSError as error:
            warn(f"{out}: what this run made is not noted: {error}")


def _cost(seconds: float, runtime: RuntimeSettings, works: bool) -> dict[str, float]:
    """Hours of processor, children among them, and of the devices that a stage held."""
    used = os.times()
    cpu = used.user + used.system + used.children_user + used.children_system
    hours = {"cost/cpu_hours": cpu / 3600}
    if works:
        hours[meter.DEVICE_HOURS] = runtime.devices * seconds / 3600
    return hours


def _uncommitted() -> list[str]:
    """Files of `lineage.CODE` that are not as they were committed, new ones among them; none outside a git repository."""
    try:
        said = _git("status", "--porcelain", "--untracked-files=all", "--", *lineage.CODE)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.split(maxsplit=1)[1] for line in said.splitlines()]


def _parent() -> dict[str, Any] | None:
    if given := os.environ.get(PARENT):
        return {"id": given, "name": "pipeline", "ends_with_stages": False}
    if "DVC_STAGE" not in os.environ:
        return None
    import psutil  # DVC itself needs it

    for process in psutil.Process().parents():
        words = process.cmdline()
        if any(Path(word).name == "dvc" for word in words[:2]) or words[1:3] == ["-m", "dvc"]:
            started = int(process.create_time() * 1000)
            name = time.strftime("dvc repro %Y-%m-%d %H:%M:%S", time.localtime(started / 1000))
            return {"id": f"dvc-{socket.gethostname()}-{process.pid}-{started}", "name": name, "ends_with_stages": True}
    return None


def _origin() -> dict[str, str]:
    """The commit that ran, whether tracked files differed from it, and DVC's name for the stage."""
    origin = {key: os.environ[key] for key in ("DVC_STAGE", "DVC_EXP_NAME") if key in os.environ}
    try:
        commit = _git("rev-parse", "HEAD")
        origin["git.dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
        origin["mlflow.source.git.commit"] = commit
    except (OSError, subprocess.CalledProcessError):
        origin["mlflow.source.git.commit"] = "none"  # an export without its history
    return origin


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout.strip()


def _start_mirror(journal: Path, runtime: RuntimeSettings) -> subprocess.Popen[bytes] | None:
    if runtime.tracking_uri == JOURNAL_ONLY or not journal.exists():
        return None
    command = [sys.executable, "-m", "components.mirror", str(journal)]
    # The address travels in the environment: it may hold a password, and command lines are public.
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "ALIGNTI_TRACKING_URI": runtime.tracking_uri,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,  # it is found from wherever this file was
    }
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    except OSError as error:
        warn(f"cannot start the process that sends {journal} to MLflow ({error}); `alignti sync` sends it later")
        return None


def _finish_mirror(mirror: subprocess.Popen[bytes] | None, journal: Path) -> None:
    """Closing its stdin tells the mirror that the journal is complete; what is not sent soon it sends after the stage."""
    if mirror is None or mirror.stdin is None:
        return
    mirror.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        if mirror.wait(PATIENCE_S) not in (SENT, NOT_SENT_AND_SAID_SO):
            warn(f"what sends {journal} to MLflow failed with exit code {mirror.returncode}; `alignti sync` sends it later")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
