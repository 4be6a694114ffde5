"""MLflow run of one outcome: an arm's settings, scores and cost in one row of the table, without a parent run.

Runs of stages record progress; this one records the result. It is journalled once per pair of student and scores, whether the
stages ran or were restored from the cache, and links the runs that made the bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from components.config.runtime import RuntimeSettings
from components.config.settings import Settings
from components.records.distill import Cost
from components.records.evaluate import Scores
from components.records.paths import SCORES, STUDENTS
from components.tracking import history, journal, provenance
from components.tracking.stage_run import nearest_recipe

ARM, CELL = "arm", "cell"  # tag `stage` of these runs: an arm of params/study.yaml, a cell of a study
TRAINING = "workflowType=machine_learning"  # else MLflow shows its pages for LLM applications
DIGITS = 12  # length of a digest in a journal's name
PER_TOKEN = ("token_f1", "nats_per_token", "kl_per_token")
FINGERPRINT = "eval.fingerprint"


def record(arm: str, md5: str, params: Mapping[str, Any], runtime: RuntimeSettings, stage: str = ARM, **tags: str) -> str:
    """Journal the arm's outcome, unless it was before; returns the journal's name.

    `md5` is DVC's digest of the student, `params` the columns of MLflow's table and plots. Raises DataError without cost.json.
    """
    folder = SCORES / arm
    scores, cost = Scores.read(folder / "scores.json"), Cost.read(STUDENTS / arm / "cost.json")
    scores_md5 = provenance.digest(folder).md5
    last_runs = {name: history.last(f"{name}@{arm}") for name in ("distill", "evaluate")}
    run_links = {f"run.{name}": last.run if last else None for name, last in last_runs.items()}
    run_links["run.distill"] = provenance.maker(md5) or run_links["run.distill"]  # restored bytes come from an earlier run
    key = _key(stage, arm, md5, scores_md5, params, tags)
    journal.record(
        key,
        arm,
        runtime=runtime,
        tags={
            "stage": stage,
            stage: arm,
            FINGERPRINT: json.dumps(scores.fingerprint and scores.fingerprint.model_dump(mode="json"), sort_keys=True),
            "dvc.path": str(STUDENTS / arm),
            "dvc.md5": md5,
            "dvc.scores": scores_md5,
            "device": cost.device,
            **{link: run for link, run in run_links.items() if run},
            **tags,
        },
        params=params,
        metrics={
            "exact_match": scores.exact_match,
            **{f"exact_match/{kind}": value for kind, value in scores.per_kind.items()},
            **{name: value for name in PER_TOKEN if (value := getattr(scores, name)) is not None},
            "cost/train_seconds": cost.train_seconds,
            "cost/device_hours": runtime.devices * cost.train_seconds / 3600,
            **({} if cost.step_seconds is None else {"cost/step_seconds": cost.step_seconds}),
            "cost/peak_memory_mib": cost.peak_memory_mib,
            "cost/steps": cost.steps,
            **{name.replace("usage/", "cost/"): wh for name, wh in history.energy(run_links["run.distill"] or "").items()},
        },
        artifacts=[folder / "scores.json", folder / "predictions.jsonl"],
    )
    journal.renew(key, f"{key[:-DIGITS]}{'?' * DIGITS}")
    return key


def _key(stage: str, arm: str, md5: str, scores_md5: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps([md5, scores_md5, params, tags]).encode()).hexdigest()
    return f"{stage}-{arm}-{digest[:DIGITS]}"


def of_arm(arm: str, md5: str, settings: Settings) -> str:
    """`record` for an arm of params/study.yaml; params are the values in which its arms differ."""
    return record(arm, md5, _varied(settings)[arm], settings.runtime, **nearest_recipe().tag)


def _varied(settings: Settings) -> dict[str, dict[str, Any]]:
    return varied({name: settings.arm(name).model_dump(mode="json") for name in settings.study.arms})


def varied(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Values of each arm at the settings' paths (`weights.tpa`) in which the arms differ."""
    flattened = {name: dict(journal.flatten(arm)) for name, arm in arms.items()}
    paths = dict.fromkeys(path for arm in flattened.values() for path in arm)
    differing = [path for path in paths if len({json.dumps(arm.get(path)) for arm in flattened.values()}) > 1]
    return {
        name: {path: arm.get(path, 0.0 if path.startswith("weights.") else None) for path in differing}
        for name, arm in flattened.items()
    }


def current_outcomes(settings: Settings) -> list[str]:
    """Journals' names of the outcomes of the arms, by `dvc.lock`; those of earlier results have others."""
    digests, tags = provenance.digests(), nearest_recipe().tag
    return [
        _key(ARM, arm, digests.get(str(STUDENTS / arm), ""), digests.get(str(SCORES / arm), ""), params, tags)
        for arm, params in _varied(settings).items()
    ]


def comparison(outcomes: Sequence[str], server: str) -> str | None:
    """URL of MLflow's comparison page for these outcomes; None unless all were sent."""
    sent = [state for name in outcomes if (state := history.sync_state(name)) and state["run_id"]]
    if len(sent) < len(outcomes):
        return None
    return page(server, [state["run_id"] for state in sent], sent[0]["experiment"])


def page(server: str, runs: Sequence[str], experiment: str) -> str:
    """URL of MLflow's comparison page."""
    query = f"runs={quote(json.dumps(list(runs)))}&experiments={quote(json.dumps([experiment]))}"
    return f"{server.rstrip('/')}/#/compare-runs?{query}&{TRAINING}"
