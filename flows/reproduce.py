"""`alignti reproduce RUN_ID`: reruns a recorded run and compares the bytes.

The code is that of the run's commit, in a separate worktree; the raw data is that of the commit's .dvc files; params/ are as
recorded. A run of uncommitted code is rejected: its code is not available.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.config.settings import Settings
from components.errors import InputError, meant
from components.io import write_text
from components.tracking import history, mlflow_client, mlflow_mirror, mlflow_registry, provenance
from components.tracking.journal import JOURNALS, events
from components.tracking.stage_run import JOURNAL_ONLY, PARENT, stage_run
from flows import dvc, dvc_repro, stage_output
from flows.workspace import workspace

MLFLOW_ID = re.compile("[0-9a-f]{32}")
TIMED = ("cost.json",)  # files with timings, which never repeat
PAGES = "reports/"  # pages and plots with timings


@dataclass(frozen=True)
class RecordedRun:
    """Provenance of a stage's run, from its journal or from MLflow."""

    run: str
    stage: str
    commit: str
    uncommitted: list[str]  # files of uncommitted code
    params: dict[str, str]  # file -> text
    inputs: dict[str, str]  # path -> md5
    outputs: dict[str, provenance.Digest]


@dataclass(frozen=True)
class Outcome:
    """Comparison of the rerun with the recorded run, file by file."""

    recorded: RecordedRun
    equal: list[str] = field(default_factory=list)
    timed: list[str] = field(default_factory=list)  # different, in files with timings
    different: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)  # inputs of the stage that differ

    @property
    def same(self) -> bool:
        return not self.different and bool(self.equal)

    def __str__(self) -> str:
        stage, run = self.recorded.stage, self.recorded.run
        timed_note = f"; {', '.join(self.timed)} hold(s) times, which differ" if self.timed else ""
        if self.same:
            return f"{stage} of run {run}: the same bytes, {len(self.equal)} file(s) compared by md5{timed_note}"
        inputs_note = f", and so does what it read ({', '.join(self.inputs)})" if self.inputs else ", from the same inputs"
        return (
            f"{stage} of run {run}: NOT the same bytes: {', '.join(self.different)} differ(s){inputs_note};"
            f" {len(self.equal)} file(s) are equal{timed_note}"
        )


def find(run: str, settings: Settings) -> RecordedRun:
    """Provenance of `run`: an MLflow run id, or the name of a journal in .runs/journal.

    Raises:
        InputError: no such run, not a stage's, not finished, or recorded without params.
        TryAgainError: MLflow does not answer.
    """
    run = Path(run).name.removesuffix(".sent").removesuffix(".jsonl")  # file names and paths are accepted too
    if not re.fullmatch(r"[\w@.-]+", run):
        raise InputError(f"{run!r} is no id of a run")
    journal = JOURNALS / f"{run}.jsonl"
    if not journal.exists():
        states = (file for file in JOURNALS.glob("*.sent") if json.loads(file.read_text(encoding="utf-8"))["run_id"] == run)
        journal = next(states, journal).with_suffix(".jsonl")
    if journal.exists():
        return _from_journal(run, journal, settings)
    if not MLFLOW_ID.fullmatch(run):
        suggestion = meant(run, (path.stem for path in JOURNALS.glob("*.jsonl")))
        raise InputError(f"there is no run {run!r} in {JOURNALS}; {suggestion}`alignti runs` lists them")
    if settings.runtime.tracking_uri == JOURNAL_ONLY:
        raise InputError(f"there is no journal {run} in {JOURNALS}, and no MLflow to ask (tracking_uri is `journal`)")
    with mlflow_client.asking("MLflow does not answer", "nothing was run"):
        recorded = mlflow_registry.none_if_absent(
            lambda: _from_mlflow(run, mlflow_client.client(settings.runtime.tracking_uri))
        )
    if recorded is None:
        raise InputError(f"neither {JOURNALS} nor MLflow has a run {run}")
    return recorded


def reproduce(recorded: RecordedRun, settings: Settings, stage_only: bool = False) -> Outcome:
    """Rerun the stage and the stages before it (`stage_only`: these are restored from DVC's cache, if it has them).

    Raises:
        InputError: its code or its data is not available.
        StageFailed: a stage failed.
    """
    _check_available(recorded)
    title = f"reproduce-{recorded.run[:32].replace('@', '-')}"
    with workspace(title, recorded.commit), stage_run("reproduce", runtime=settings.runtime, metered=False) as run:
        for file, text in recorded.params.items():
            write_text(Path(file), text)
        run.tag("reproduces", recorded.run)
        chain = list(dvc.graph([recorded.stage]))
        _print_stages(chain[-1:] if stage_only else chain)
        for stage in chain:
            with closing(stage_output.Labelled(stage, verbose=False)) as printer:
                dvc_repro.reproduce(stage, {PARENT: run.id}, force=stage == recorded.stage or not stage_only, on_line=printer)
        outcome = _compare(recorded)
        run.tag("same_bytes", str(outcome.same).lower())
    return outcome


def _print_stages(stages: list[str]) -> None:
    seconds = [last.seconds for stage in stages if (last := history.last(stage))]
    minutes = f"; they took {sum(seconds) / 60:.1f} min when they last ran here" if len(seconds) == len(stages) else ""
    print(f"{len(stages)} stage(s) to run anew: {', '.join(stages)}{minutes}", flush=True)


def _check_available(recorded: RecordedRun) -> None:
    if recorded.uncommitted:
        raise InputError(
            f"run {recorded.run} ran code that was not committed ({', '.join(recorded.uncommitted)}), so it cannot be checked"
            " out; runs of committed code can be reproduced, and `alignti study run` and the deployments run no other"
        )
    if not re.fullmatch(r"[0-9a-f]{40,64}", recorded.commit):
        raise InputError(f"run {recorded.run} was made outside a git repository, so its code is nowhere to be had")
    if not provenance.has_commit(recorded.commit):
        raise InputError(
            f"commit {recorded.commit} of run {recorded.run} is not in this clone; `git fetch` the branch it is on"
        )


def _compare(recorded: RecordedRun) -> Outcome:
    outcome = Outcome(recorded)
    for path, digest in recorded.outputs.items():
        current_files = provenance.digest(Path(path)).files
        for name in sorted(digest.files.keys() | current_files.keys()):
            file = path if name == "." else f"{path}/{name}"
            if digest.files.get(name) == current_files.get(name):
                outcome.equal.append(file)
            elif Path(name).name in TIMED or file.startswith(PAGES):
                outcome.timed.append(file)
            else:
                outcome.different.append(file)
    current_inputs = provenance.digests()
    outcome.inputs.extend(path for path, md5 in recorded.inputs.items() if current_inputs.get(path) != md5)
    return outcome


def _from_journal(run: str, journal: Path, settings: Settings) -> RecordedRun:
    lines = events(journal)
    tags = lines[0]["tags"] if lines else {}  # none: process killed before its first line
    origins = [line for line in lines if line["event"] == "origin"]
    source = tags.get("run.distill") or next((e["made_by"] for e in lines if e["event"] == "register"), None)
    if source and not origins:
        return find(source, settings)
    return _recorded_run(
        run,
        tags,
        origins[-1] if origins else None,
        {line["name"]: line["digest"] for line in lines if line["event"] == "dataset" and line.get("source") == "dvc"},
        {line["path"]: line for line in lines if line["event"] == "made"},
    )


def _from_mlflow(run: str, client: Any) -> RecordedRun:
    from mlflow.artifacts import load_dict

    mlflow_run = client.get_run(run)
    base, tags = mlflow_run.info.artifact_uri, mlflow_run.data.tags
    files = {entry.path for entry in _files(client, run, "")}
    inputs = {i.dataset.name: i.dataset.digest for i in mlflow_run.inputs.dataset_inputs if i.dataset.source_type == "dvc"}
    outputs = [load_dict(f"{base}/{file}") for file in files if file.startswith(f"{mlflow_mirror.OUTS}/")]
    origin = load_dict(f"{base}/{mlflow_mirror.ORIGIN}") if mlflow_mirror.ORIGIN in files else None
    return _recorded_run(run, tags, origin, inputs, {entry["path"]: entry for entry in outputs})


def _files(client: Any, run: str, folder: str) -> list[Any]:
    files = []
    for entry in client.list_artifacts(run, folder):
        files += _files(client, run, entry.path) if entry.is_dir else [entry]
    return files


def _recorded_run(
    run: str, tags: Mapping[str, str], origin: Mapping[str, Any] | None, inputs: dict[str, str], outputs: Mapping[str, Any]
) -> RecordedRun:
    """Provenance from tags and records. Raises InputError if they do not suffice for a rerun."""
    stage = tags.get("DVC_STAGE")
    if stage is None or origin is None:
        raise InputError(
            f"run {run} ({tags.get('stage', 'of no stage')}) cannot be reproduced: it is no stage of dvc.yaml that `dvc repro`"
            " or a flow ran, or it was recorded before runs told their params; name a run such as distill/ARM"
        )
    if not outputs:
        raise InputError(f"run {run} of {stage} did not finish, so there is nothing to compare with")
    return RecordedRun(
        run=run,
        stage=stage,
        commit=tags.get("mlflow.source.git.commit", "none"),
        uncommitted=origin["uncommitted"],
        params=origin["params"],
        inputs=inputs,
        outputs={path: provenance.Digest(entry["md5"], entry["files"]) for path, entry in outputs.items()},
    )
