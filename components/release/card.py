"""Full model card of an export: the card of `distill` plus scores, cost, and reproduction commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from components.distill.card import START
from components.errors import without_login
from components.records.compare import ArmResult, Comparison
from components.records.dataset import Manifest
from components.records.distill import Cost
from components.records.paths import DATASET, REPORTS, STUDENTS
from components.report import markdown as md
from components.tracking import history, provenance
from components.tracking.system_metrics import CPU_WH, GPU_WH

# Stages upstream of `distill@ARM`, whose outputs the card lists.
BEFORE = ("prepare", "obtain_models", "check_rows", "select_teacher", "search_layer", "cache_teacher", "write_answers")


def full(arm: str, folder: Path, dtype: str) -> tuple[str, list[str]]:
    """Card of `arm` exported to `folder` in `dtype`, and its missing entries as phrases.

    Raises DataError if a record of the arm is missing or unreadable.
    """
    trained = STUDENTS / arm
    text = (trained / "model/README.md").read_text(encoding="utf-8")
    text = text.replace(f'"{(trained / "model").as_posix()}"', f'"{folder.name}"')
    scores, front, without_scores = _scores(arm)
    again, without_origin = _again(arm, folder, dtype)
    added = f"{scores}\n{_cost(arm)}\n{again}\n## Everything that decided its weights\n\n{START}"
    card = ModelCard(text.replace(f"## Everything that decided its weights\n\n{START}", added))
    for key, value in front.items():
        setattr(card.data, key, value)
    return str(card), [*without_scores, *without_origin]


def _scores(arm: str) -> tuple[str, dict[str, Any], list[str]]:
    """Section, front matter and missing entries; scores count only if DVC's hash matches the current weights."""
    file, model, none = REPORTS / "compare.json", STUDENTS / arm / "model", "## Scores\n\nNot measured.\n"
    measured = provenance.read_by(f"evaluate@{arm}").get(model.as_posix())
    if not file.is_file() or measured != provenance.digest(model).md5:
        return none, {}, [f"scores: {file} has none of these weights; `dvc repro` measures them"]
    comparison = Comparison.read(file)
    result, teacher = next((found for found in comparison.arms.values() if arm in found.runs), None), comparison.teacher
    if result is None:
        return none, {}, [f"scores: {file} has no arm {arm}; `dvc repro` measures it"]
    over = f" over {len(result.runs)} seeds" if len(result.runs) > 1 else ""
    percent = round(100 * comparison.confidence)
    whole = [_with(each.exact_match, each.ci95) for each in (result, teacher)]
    rows = [["**all**", f"{comparison.n:,}", f"**{whole[0]}**", whole[1]]]
    for kind, count in comparison.kinds.items():
        shares = (_with(each.per_kind[kind], each.per_kind_ci95[kind]) for each in (result, teacher))
        rows.append([kind, f"{count:,}", *shares])
    text = "\n".join(
        [
            "## Scores\n",
            f"Exact match on {comparison.n:,} questions about {comparison.images:,} images of the {comparison.split} split;"
            f" in brackets {percent}% intervals.\n",
            md.table(["questions", "number", "student", "teacher"], rows),
            "",
            *([f"Means{over}; this student's own exact match: {result.runs[arm]:.1%}.\n"] if over else []),
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
        metric_name=f"exact match ({percent}% interval {result.ci95[0]:.4f} to {result.ci95[1]:.4f}{over})",
        metric_value=result.runs[arm],
    )
    return text, {"model-index": eval_results_to_model_index(arm, [value])}, []


def _gains(result: ArmResult) -> list[str]:
    said = []
    for name, gain in result.gains.items():
        noise = "more than" if gain.larger_than_noise else "not more than"
        low, high = (100 * end for end in gain.ci95)
        said.append(f"- Over {name}: {100 * gain.difference:+.1f} points ({low:+.1f} to {high:+.1f}), {noise} the noise.")
    return [*said, ""] if said else []


def _with(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.1f}% ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _cost(arm: str) -> str:
    cost = Cost.read(STUDENTS / arm / "cost.json")
    used = history.energy(_run(arm) or "")
    energy = [f"{used[key]:.3g} Wh of the {what}" for key, what in ((GPU_WH, "GPUs"), (CPU_WH, "processors")) if key in used]
    return (
        f"## Cost\n\n{cost.steps:,} steps in {cost.train_seconds:,.0f} s on {cost.device}, at most"
        f" {cost.peak_memory_mib:,.0f} MiB. Energy: {' and '.join(energy) or 'not measured'}.\n"
    )


def _again(arm: str, folder: Path, dtype: str) -> tuple[str, list[str]]:
    """Section on reproduction (commit, hashes, commands), and its missing entries."""
    run, missing = _run(arm), []
    commit, changed = history.ran(run) if run else (None, [])
    if commit is None:
        missing.append("the commit: no journal here says which run made these weights")
    if changed:
        missing.append(f"a commit of all that ran: {', '.join(changed)} differed from {commit}")
    locked = provenance.locked()
    mine = locked.get(f"distill@{arm}", {})
    if mine.get((STUDENTS / arm).as_posix()) != provenance.digest(STUDENTS / arm).md5:
        missing.append("DVC's hashes: dvc.lock is of other weights than these; `dvc repro`, or `dvc checkout`")
        rows = []
    else:
        outs = {**provenance.raw(), **{path: md5 for stage in BEFORE for path, md5 in locked.get(stage, {}).items()}, **mine}
        rows = [md.table(["what", "DVC's md5"], ([f"`{path}`", f"`{md5}`"] for path, md5 in outs.items()), text_columns=2), ""]
    with_others = f", but with other {', '.join(changed)} (below is what decided the weights)" if changed else ""
    lines = [
        "## How to make it again\n",
        f"Commit `{commit or 'not known'}` of {_remote()}{with_others}.\n",
        "```sh",
        f"git checkout {commit or 'COMMIT'}",
        *(_params(run) if run and any(file.startswith("params/") for file in changed) else []),
        f"dvc repro distill@{arm}",
        f"alignti export {arm} {shlex.quote(folder.name)} --dtype {dtype}",
        *([f"alignti reproduce {run}   # where it was made: runs it again and compares the bytes"] if run else []),
        "```\n",
        *rows,
    ]
    return "\n".join(lines), missing


def _params(run: str) -> list[str]:
    """Lines that restore params/ that were not committed, as far as a recipe does."""
    recipe, _, changed = history.tags(run).get("recipe", "").partition(" with ")
    rest = "# then set in params/*.yaml what is said below under: everything that decided its weights"
    return [*([f"alignti use {recipe}"] if recipe else []), *([] if recipe and not changed else [rest])]


def _run(arm: str) -> str | None:
    """Journal id of the run that trained the current weights, also if DVC restored them from a cache."""
    return provenance.maker(provenance.digest(STUDENTS / arm).md5)


def _remote() -> str:
    """URL of the git remote `origin`, without credentials."""
    address = provenance.git("remote", "get-url", "origin") or ""
    return without_login(address) if "://" in address else "this project"
