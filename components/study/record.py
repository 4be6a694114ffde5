"""MLflow run of one cell of a study: what was varied, and what came out.

A stage's own runs say how it went; this one says what stands. It is told once for each outcome, whether the stages ran or were
restored, and names the runs that made the bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from components.config.runtime import RuntimeSettings
from components.records.distill import Cost
from components.records.paths import SCORES, STUDENTS
from components.study.expand import Cell
from components.tracking import history, journal, provenance

STAGE = "cell"  # the tag by which `compare` finds these runs
FINGERPRINT = "eval.fingerprint"


def record(study: str, cell: Cell, varied: Sequence[str], digest: str, runtime: RuntimeSettings, parent: str) -> bool:
    """Journal the cell's outcome; `digest` is DVC's of the student, `parent` the study's run. False if it was told before.

    Raises DataError if the cell has no cost record.
    """
    scores_file, cost_file = SCORES / cell.name / "scores.json", STUDENTS / cell.name / "cost.json"
    text = scores_file.read_text(encoding="utf-8")
    scores, cost = json.loads(text), Cost.read(cost_file)
    outcome = hashlib.sha256(f"{digest}{text}{cost_file.read_text(encoding='utf-8')}".encode()).hexdigest()
    made_by = {f"run.{stage}": history.last_run(f"{stage}@{cell.name}") for stage in ("distill", "evaluate")}
    made_by["run.distill"] = provenance.maker(digest) or made_by["run.distill"]  # restored bytes are an earlier run's
    flat = dict(journal.flatten(cell.arm.model_dump(mode="json")))
    return journal.record(
        f"cell-{study}-{cell.name}-{outcome[:12]}",
        cell.name,
        runtime=runtime,
        parent=parent,
        tags={
            "stage": STAGE,
            "study": study,
            "cell": cell.name,
            "variant": cell.variant,
            FINGERPRINT: json.dumps(scores.get("fingerprint"), sort_keys=True),
            "dvc.path": str(STUDENTS / cell.name),
            "dvc.md5": digest,
            "device": cost.device,
            **{key: value for key, value in made_by.items() if value},
        },
        params={path: flat.get(path, 0.0 if path.startswith("weights.") else None) for path in varied},
        metrics={
            "exact_match": scores["exact_match"],
            **{f"exact_match/{kind}": value for kind, value in scores["per_kind"].items()},
            **{name: scores[name] for name in ("token_f1", "nats_per_token", "kl_per_token") if scores.get(name) is not None},
            "cost/train_seconds": cost.train_seconds,
            "cost/device_hours": cost.train_seconds / 3600,
            "cost/peak_memory_mib": cost.peak_memory_mib,
            "cost/steps": cost.steps,
            **history.energy(made_by["run.distill"] or ""),
        },
        artifacts=[scores_file, SCORES / cell.name / "predictions.jsonl"],
    )


def varied(cells: Sequence[Cell]) -> list[str]:
    """The paths in which the arms differ, e.g. `weights.tpa`: what MLflow's table and plots should show, and no more."""
    arms = [dict(journal.flatten(cell.arm.model_dump(mode="json"))) for cell in cells]
    paths = dict.fromkeys(path for arm in arms for path in arm)
    return [path for path in paths if len({json.dumps(arm.get(path)) for arm in arms}) > 1]
