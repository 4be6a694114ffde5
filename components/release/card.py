"""Full model card of an export: the card of `distill` plus scores, cost, and reproduction commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from components.distill.card import START
from components.errors import without_login
from components.models.checkpoint_folder import as_model_error
from components.records.compare import ArmResult, Comparison
from components.records.dataset import Manifest
from components.records.distill import Cost
from components.records.paths import DATASET, REPORTS, STUDENTS
from components.records.record import content
from components.report import markdown as md
from components.tracking import history, provenance
from components.tracking.system_metrics import CPU_WH, GPU_WH

# Stages upstream of `distill@ARM`, whose outputs the card lists.
UPSTREAM = ("prepare", "obtain_models", "check_rows", "select_teacher", "search_layer", "cache_teacher", "write_answers")


def full_card(arm: str, folder: Path, dtype: str) -> tuple[str, list[str]]:
    """Card of `arm` exported to `folder` in `dtype`, and its missing entries as phrases.

    Raises DataError if a record of the arm is missing or unreadable, ModelError if its first card is.
    """
    student_folder = STUDENTS / arm
    text = content(student_folder / "model/README.md").decode("utf-8", "replace")
    text = text.replace(f'"{(student_folder / "model").as_posix()}"', f'"{folder.name}"')
    scores, front_matter, missing_scores = _scores(arm)
    md5 = provenance.digest(student_folder).md5
    run = provenance.maker(md5)  # also if DVC restored the weights from a cache
    reproduction, missing_origin = _reproduction(arm, md5, run, folder, dtype)
    sections = f"{scores}\n{_cost(arm, run)}\n{reproduction}\n## Everything that decided its weights\n\n{START}"
    with as_model_error(f"{student_folder}/model/README.md is damaged; `dvc repro distill@{arm}` makes it anew"):
        card = ModelCard(text.replace(f"## Everything that decided its weights\n\n{START}", sections))
    for key, value in front_matter.items():
        setattr(card.data, key, value)
    return str(card), [*missing_scores, *missing_origin]


def _scores(arm: str) -> tuple[str, dict[str, Any], list[str]]:
    """Section, front matter and missing entries; scores count only if DVC's hash matches the current weights."""
    file, model, not_measured = REPORTS / "compare.json", STUDENTS / arm / "model", "## Scores\n\nNot measured.\n"
    measured_md5 = provenance.read_by(f"evaluate@{arm}").get(model.as_posix())
    if not file.is_file() or measured_md5 != provenance.digest(model).md5:
        return not_measured, {}, [f"scores: {file} has none of these weights; `dvc repro` measures them"]
    comparison = Comparison.read(file)
    result, teacher = next((r for r in comparison.arms.values() if arm in r.runs), None), comparison.teacher
    if result is None:
        return not_measured, {}, [f"scores: {file} has no arm {arm}; `dvc repro` measures it"]
    over_seeds = f" over {len(result.runs)} seeds" if len(result.runs) > 1 else ""
    percent = round(100 * comparison.confidence)
    overall = [_format_score(scores.exact_match, scores.ci95) for scores in (result, teacher)]
    rows = [["**all**", f"{comparison.n:,}", f"**{overall[0]}**", overall[1]]]
    for kind, count in comparison.kinds.items():
        scores_by_kind = (_format_score(scores.per_kind[kind], scores.per_kind_ci95[kind]) for scores in (result, teacher))
        rows.append([kind, f"{count:,}", *scores_by_kind])
    text = "\n".join(
        [
            "## Scores\n",
            f"Exact match on {comparison.n:,} questions about {comparison.images:,} images of the {comparison.split} split;"
            f" in brackets {percent}% intervals.\n",
            md.table(["questions", "number", "student", "teacher"], rows),
            "",
            *([f"Means{over_seeds}; this student's own exact match: {result.runs[arm]:.1%}.\n"] if over_seeds else []),
            *_gains(result),
            f"{comparison.method}\n",
        ]
    )
    title = Manifest.read(DATASET / "manifest.json").source
    value = EvalResult(
        task_type="visual-question-answering",
        dataset_type=title,
        dataset_name=f"{title}, made by this pipeline",
        dataset_split=comparison.split,
        metric_type="exact_match",
        metric_name=f"exact match ({percent}% interval {result.ci95[0]:.4f} to {result.ci95[1]:.4f}{over_seeds})",
        metric_value=result.runs[arm],
    )
    return text, {"model-index": eval_results_to_model_index(arm, [value])}, []


def _gains(result: ArmResult) -> list[str]:
    lines = []
    for name, gain in result.gains.items():
        noise = "more than" if gain.larger_than_noise else "not more than"
        low, high = (100 * end for end in gain.ci95)
        lines.append(f"- Over {name}: {100 * gain.difference:+.1f} points ({low:+.1f} to {high:+.1f}), {noise} the noise.")
    return [*lines, ""] if lines else []


def _format_score(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.1f}% ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _cost(arm: str, run: str | None) -> str:
    cost = Cost.read(STUDENTS / arm / "cost.json")
    wh = history.energy(run or "")
    energy = [f"{wh[key]:.3g} Wh of the {device}" for key, device in ((GPU_WH, "GPUs"), (CPU_WH, "processors")) if key in wh]
    return (
        f"## Cost\n\n{cost.steps:,} steps in {cost.train_seconds:,.0f} s on {cost.device}, at most"
        f" {cost.peak_memory_mib:,.0f} MiB. Energy: {' and '.join(energy) or 'not measured'}.\n"
    )


def _reproduction(arm: str, student_md5: str, run: str | None, folder: Path, dtype: str) -> tuple[str, list[str]]:
    """Section on reproduction (commit, hashes, commands), and its missing entries."""
    missing = []
    commit, changed = history.ran(run) if run else (None, [])
    if commit is None:
        missing.append("the commit: no journal here says which run made these weights")
    if changed:
        missing.append(f"a commit of all that ran: {', '.join(changed)} differed from {commit}")
    locked = provenance.locked()
    arm_outs = locked.get(f"distill@{arm}", {})
    if arm_outs.get((STUDENTS / arm).as_posix()) != student_md5:
        missing.append("DVC's hashes: dvc.lock is of other weights than these; `dvc repro`, or `dvc checkout`")
        rows = []
    else:
        outs = {
            **provenance.raw(),
            **{path: md5 for stage in UPSTREAM for path, md5 in locked.get(stage, {}).items()},
            **arm_outs,
        }
        rows = [md.table(["what", "DVC's md5"], ([f"`{path}`", f"`{md5}`"] for path, md5 in outs.items()), text_columns=2), ""]
    changed_note = f", but with other {', '.join(changed)} (below is what decided the weights)" if changed else ""
    lines = [
        "## How to make it again\n",
        f"Commit `{commit or 'not known'}` of {_remote()}{changed_note}.\n",
        "```sh",
        f"git checkout {commit or 'COMMIT'}",
        *(_params_commands(run) if run and any(file.startswith("params/") for file in changed) else []),
        f"dvc repro distill@{arm}",
        f"alignti export {arm} {shlex.quote(folder.name)} --dtype {dtype}",
        *([f"alignti reproduce {run}   # where it was made: runs it again and compares the bytes"] if run else []),
        "```\n",
        *rows,
    ]
    return "\n".join(lines), missing


def _params_commands(run: str) -> list[str]:
    """Lines that restore params/ that were not committed, as far as a recipe does."""
    recipe, _, changed = history.tags(run).get("recipe", "").partition(" with ")
    comment = "# then set in params/*.yaml what is said below under: everything that decided its weights"
    return [*([f"alignti use {recipe}"] if recipe else []), *([] if recipe and not changed else [comment])]


def _remote() -> str:
    """URL of the git remote `origin`, without credentials."""
    url = provenance.git("remote", "get-url", "origin") or ""
    return without_login(url) if "://" in url else "this project"
