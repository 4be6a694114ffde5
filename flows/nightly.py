"""Nightly flow: if anything changed since the champion, train what is stale, compare, promote or report why not.

Changes are: new raw data, drift of the prepared set's figures, another recipe, and committed code or params other than the
champion's.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from components.config import recipes
from components.config.load import load_settings
from components.model_registry import drift, record
from components.records.dataset import Manifest
from components.records.paths import DATASET, RAW
from components.tracking import provenance
from components.tracking.mlflow_registry import Version
from components.tracking.stage_run import nearest_recipe
from flows import dvc_repro, notify, promote
from flows.pipeline import RecipeName, end_with_worker, folder, pipeline, run_name, tag


@flow(name="alignti-nightly", flow_run_name=run_name, on_failure=[notify.failed], on_crashed=[notify.failed])
def nightly(
    recipe: RecipeName = None,
    parallel: Annotated[int, Field(ge=1, le=64)] = 1,
    drift_above: Annotated[float, Field(gt=0, lt=1)] = 0.05,
) -> dict[str, Any]:
    """Retrain if there is reason to, and let the best student challenge the champion; returns the reasons and the verdict.

    Args:
        recipe: params/recipes/NAME.yaml, merged into params/ first.
        parallel: stages at a time, where the graph allows.
        drift_above: change of a figure of the prepared set that counts: of a share by so much, of a count by that part of it.

    Raises:
        StageFailed: of the first stage that failed; the champion stays.
        TryAgainError: MLflow, which knows the champion, does not answer.
    """
    end_with_worker()
    with folder(isolated=True, recipe=recipe):
        tag(recipe or recipes.nearest()[0])
        settings = load_settings()
        champion = promote.champion(settings)
        dvc_repro.reproduce("prepare")
        reasons = retrain_reasons(champion, Manifest.read(DATASET / "manifest.json"), drift_above)
        if not reasons:
            return _publish(reasons, None, f"nothing new since {champion}: nothing was trained")
        print("retraining, since " + "; ".join(reasons))
        pipeline(parallel=parallel)
        best = record.best(record.scored_students(list(settings.study.arms)))
        verdict = promote.promote(best.arm, settings, measure=True)
        return _publish(reasons, verdict, verdict.why)


def retrain_reasons(champion: Version | None, manifest: Manifest, drift_above: float) -> list[str]:
    """Reasons to train, as text; empty if nothing changed since the champion."""
    if champion is None:
        return ["there is no champion yet"]
    reasons = []
    raw, champion_raw = provenance.raw().get(str(RAW)), champion.tags.get("dvc.raw")
    if raw != champion_raw:
        reasons.append(f"new data: {RAW} is {_short_md5(raw)}, the champion's was {_short_md5(champion_raw)}")
    figures = json.loads(champion.tags.get("data.statistics", "{}"))
    if figures and (drifted := drift.changed_statistics(figures, drift.statistics(manifest), drift_above)):
        reasons.append(f"the prepared set has moved: {', '.join(drifted)}")
    recipe, champion_recipe = (tags.get("recipe", "not known") for tags in (nearest_recipe().tag, champion.tags))
    if recipe != champion_recipe:
        reasons.append(f"another recipe: {recipe}, the champion's was {champion_recipe}")
    if code_changes := _changed_since(champion.tags.get("mlflow.source.git.commit")):
        reasons.append(code_changes)
    return reasons


def _changed_since(commit: str | None) -> str | None:
    """Text on committed code or params that differ from those of `commit`; None if they are equal."""
    if commit is None:
        return "it is not known which code made the champion"
    code = [path for path in provenance.CODE if path != f"{RAW}.dvc"]  # new data is a separate reason
    output = provenance.git("diff", "--name-only", commit, "HEAD", "--", *code, "params")
    if output is None:
        return f"the champion's commit {commit[:12]} is not in this clone"
    files = output.split()
    return f"{len(files)} file(s) of code or params differ from the champion's commit ({files[0]}, ...)" if files else None


def _publish(reasons: list[str], verdict: promote.Verdict | None, conclusion: str) -> dict[str, Any]:
    """Publish the result on the flow run's page and, for a new champion, to the webhook."""
    lines = "\n".join(f"- {reason}" for reason in reasons) or "- none"
    create_markdown_artifact(key="champion", markdown=f"Reasons to train:\n\n{lines}\n\n**{conclusion}**")
    print(conclusion)
    verdict_json = verdict.model_dump(mode="json") if verdict else None
    if verdict and verdict.promoted:
        notify.post("champion", f"{verdict.model}: {verdict.why}", reasons=reasons, verdict=verdict_json)
    return {"reasons": reasons, "said": conclusion, "verdict": verdict_json}


def _short_md5(md5: str | None) -> str:
    return md5[:8] if md5 else "not known"
