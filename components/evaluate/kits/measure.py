"""Scores of one model by one kit: the stage `evaluate`, VLMEvalKit over a server, or lm-eval in this process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from components.config.settings import Settings
from components.dataset.shards import Samples
from components.errors import DataError, InputError, unknown
from components.evaluate import fingerprint, metrics
from components.evaluate.__main__ import model_of
from components.evaluate.generate import questions
from components.evaluate.kits import export, lm_eval, serve, vlmeval
from components.evaluate.kits.scores import KitResult, KitScores, Verdict
from components.evaluate.kits.vlmeval_worker import JUDGE
from components.io import sha256
from components.models.checkpoint_folder import weight_files
from components.models.load import load_processor
from components.models.template import Template
from components.process import locked
from components.records.evaluate import Fingerprint, Prediction, Scores
from components.records.models import ModelIndex
from components.records.paths import DATASET, MODELS, ROWS, RUNS, SCORES
from components.runtime import prepare_torch

INITIAL_PREFIX = "before-"  # prefix of a student's name: its checkpoint before distillation
OUR_JUDGE = "our exact match"
BUSY = "another process measures this arm"
FOLDER = RUNS / "kits"
CHOICE_TASKS = {  # our tasks for VLMEvalKit: our multiple choice with options in the prompt
    "options": "AlignTI_Options",  # in one drawn order per question
    "circular": "AlignTI_Circular",  # in every rotation; right only if right in all
}


@dataclass
class Bench:
    """Questions, settings and device, shared by all models and kits."""

    settings: Settings

    @cached_property
    def samples(self) -> Samples:
        return Samples(DATASET, self.settings.evaluate.split, ROWS)

    @cached_property
    def rows(self) -> list[int]:
        return questions(self.samples)

    @property
    def system(self) -> str:
        return self.settings.models.template.system

    @cached_property
    def device(self) -> torch.device:
        return prepare_torch(self.settings.runtime, seed=0)


def measure(bench: Bench, kit: str, arm: str) -> KitScores:
    """Scores of one model on all questions of the split, by `kit`: "own", "vlmeval" or "lm-eval".

    Raises:
        ModelError, DataError: no such model, or no scores of the stage `evaluate` for it yet.
        InputError: the kit is not installed.
        TryAgainError: the kit or the server failed, or another process measures the same arm. Answers so far are kept.
    """
    model = folder_of(arm)
    if kit == "own":
        return _stage_scores(arm, model)
    started = time.monotonic()
    if kit == "lm-eval":
        result = _lm_eval(bench, arm, model, [lm_eval.QUESTIONS, *lm_eval.TEXT], [])
    else:
        sets = export.sets(bench.samples, bench.rows)
        with _session(bench, arm, model, vlmeval.kit(full=False)) as session:
            result = vlmeval.score_split(session, bench.samples, sets, bench.settings.evaluate.seed)
    return _build_scores(bench, arm, kit, model, result, time.monotonic() - started)


def is_current(bench: Bench, scores: KitScores) -> bool:
    """True if the fingerprint is unchanged and no question failed, so that measuring again would give the same scores."""
    if scores.kit == "own" or scores.failed:
        return False  # own: read from the stage's scores, which is fast
    rows = [row for row in bench.rows if bench.samples[row].upto(1).images]
    return scores.fingerprint == _fingerprint(bench, folder_of(scores.arm), rows, scores.kit)


def folder_of(arm: str) -> Path:
    """Checkpoint folder of an arm or `before-NAME`. Raises InputError if there is no student NAME, ModelError if the folder is
    no complete checkpoint."""
    model = model_of(arm)
    if arm.startswith(INITIAL_PREFIX):
        students = ModelIndex.read(MODELS / "index.json").students
        if (name := arm.removeprefix(INITIAL_PREFIX)) not in students:
            raise unknown("student", name, students)
        model = Path(students[name].path)
    weight_files(model)
    return model


def stock(bench: Bench, kit: str, arm: str, tasks: Sequence[str], blank: bool) -> dict[str, float]:
    """Scores on the kit's benchmarks, or on TSV files in VLMEvalKit's format: `task/figure` -> value. Raises as `measure`."""
    model = folder_of(arm)
    if kit == "lm-eval":
        return _lm_eval(bench, arm, model, [], tasks).figures
    if kit != "vlmeval":
        raise InputError("--task goes with --kit vlmeval or --kit lm-eval")
    files_alone = all(task.endswith(".tsv") or task in CHOICE_TASKS for task in tasks)
    installed_kit = vlmeval.kit(full=False) if files_alone else vlmeval.kit_for_benchmarks()
    kit_tasks = [_write_choice_task(bench, FOLDER / kit / arm, task) if task in CHOICE_TASKS else task for task in tasks]
    vlmeval.check_files(task for task in kit_tasks if task.endswith(".tsv"))  # fails before the server starts
    with _session(bench, arm, model, installed_kit) as session:
        return vlmeval.score_tasks(session, kit_tasks, blank)


def _write_choice_task(bench: Bench, folder: Path, task: str) -> str:
    """TSV of a task in CHOICE_TASKS. Raises InputError if the split has no multiple choice."""
    choice_sets = [kit_set for kit_set in export.sets(bench.samples, bench.rows) if kit_set.form == "mcq"]
    if not choice_sets:
        raise InputError(f"--task {task}: the {bench.settings.evaluate.split} split has no multiple choice")
    path, seed = folder / "turned" / f"{CHOICE_TASKS[task]}.tsv", bench.settings.evaluate.seed
    return str(export.write(choice_sets[0], bench.samples, path, seed, rotations=task == "circular"))


def _stage_scores(arm: str, model: Path) -> KitScores:
    scores = Scores.read(SCORES / arm / "scores.json")
    figures = scores.yes_no_overall
    yes_no_figures = (
        {f"yes_no/{name}": getattr(figures, name) for name in ("f1", "accuracy", "precision", "recall")} if figures else {}
    )
    return KitScores(
        arm=arm,
        kit="own",
        model=sha256([model]),
        samples=scores.samples,
        exact_match=scores.exact_match,
        per_kind=scores.per_kind,
        judges=dict.fromkeys(scores.per_kind, OUR_JUDGE),
        figures=yes_no_figures,
        empty=_empty(Prediction.read_lines(SCORES / arm / "predictions.jsonl")),
        fingerprint=scores.fingerprint,
    )


@contextmanager
def _session(bench: Bench, arm: str, model: Path, kit: vlmeval.Kit) -> Iterator[vlmeval.Session]:
    """Session with the served model. Raises TryAgainError while another process measures the arm."""
    folder, new_tokens = FOLDER / "vlmeval" / arm, bench.settings.evaluate.max_new_tokens
    journal = _journal(folder, model, kit.version, new_tokens, bench.device.type, bench.system)
    with locked(folder / "lock", BUSY), serve.served(model, arm, bench.device.type, folder / "server.log") as (endpoint, _):
        model_endpoint = endpoint._replace(system=bench.system)
        yield vlmeval.Session(kit, model_endpoint, folder, journal, new_tokens, f"{arm}: vlmeval")


def _lm_eval(bench: Bench, arm: str, model: Path, tasks: Sequence[str], stock: Sequence[str]) -> KitResult:
    evaluate_settings, folder = bench.settings.evaluate, FOLDER / "lm-eval" / arm
    journal_key = (
        lm_eval.installed(),
        evaluate_settings.max_new_tokens,
        evaluate_settings.batch_size,
        bench.device.type,
        bench.system,
    )
    with locked(folder / "lock", BUSY):
        return lm_eval.evaluate(
            model, bench.device, tasks, stock, evaluate_settings.batch_size, evaluate_settings.max_new_tokens,
            _journal(folder, model, *journal_key), f"{arm}: lm-eval", bench.system,
        )  # fmt: skip


def _build_scores(bench: Bench, arm: str, kit: str, model: Path, result: KitResult, seconds: float) -> KitScores:
    """Record of a kit's run: the kit's verdict where it has one, else ours; empty, overlong and failed answers are wrong."""
    rows = [row for row in bench.rows if row in result.answers]
    if not rows:
        raise DataError(f"{arm}: {kit} cannot ask any of the {len(bench.rows)} questions: none has an image")
    run_fingerprint = _fingerprint(bench, model, rows, kit)
    predicted = metrics.predictions((bench.samples[row] for row in rows), (result.answers[row] for row in rows))
    by_row = dict(zip(rows, predicted, strict=True))
    overlong = [by_row[row].id for row in result.overlong]
    failed = {by_row[row].id: reason for row, reason in result.failed.items()}
    empty = sorted(set(_empty(predicted)).difference(overlong, failed))
    unanswered = {*overlong, *failed, *empty}
    correct = {p.id: result.verdicts.get(row, p.correct) and p.id not in unanswered for row, p in by_row.items()}
    scores = metrics.score(arm, [p.model_copy(update={"correct": correct[p.id]}) for p in predicted])
    judged_kinds = {by_row[row].kind for row in result.verdicts}
    path = SCORES / arm / "predictions.jsonl"
    stage_answers = {p.id: p.answer for p in Prediction.read_lines(path)} if path.exists() else {}
    return KitScores(
        arm=arm,
        kit=kit,
        model=sha256([model]),
        samples=len(rows),
        exact_match=scores.exact_match,
        per_kind=scores.per_kind,
        judges={kind: f"the kit's {run_fingerprint.judge}" if kind in judged_kinds else OUR_JUDGE for kind in scores.per_kind},
        figures=result.figures,
        disagreements=[
            Verdict(id=p.id, kind=p.kind, reference=p.reference, answer=p.answer[:200], kit=correct[p.id], ours=p.correct)
            for p in predicted
            if correct[p.id] != p.correct
        ],
        other_answers=[p.id for p in predicted if p.answer != stage_answers.get(p.id, p.answer)],
        empty=empty,
        overlong=overlong,
        failed=failed,
        not_asked=[bench.samples[row].id for row in bench.rows if row not in result.answers],
        seconds=round(seconds, 1),
        fingerprint=run_fingerprint,
    )


def _empty(predicted: Sequence[Prediction]) -> list[str]:
    return [p.id for p in predicted if not metrics.normalise(p.answer)]


def _fingerprint(bench: Bench, model: Path, rows: Sequence[int], kit: str) -> Fingerprint:
    """Fingerprint of a kit's run; kits use the chat template saved with the model, not that of the settings."""
    folder = Path(__file__).parent
    if kit == "vlmeval":
        version, judge = f"ms-vlmeval {vlmeval.kit(full=False).version}", JUDGE
        bridge = [folder / "export.py", folder / "vlmeval_worker.py"]
    else:
        version, judge = f"lm-eval {lm_eval.installed()}", "exact_match"
        bridge = [folder / "lm_eval.py", folder / "lm_eval_tasks.py", lm_eval.TASKS]
    conditions = {"kit": kit, "kit_version": f"{version}, bridge {sha256(bridge)[:8]}", "judge": judge}
    conditions |= {"dtype": serve.DTYPE, "device": bench.device.type}
    template = Template(bench.system, style="processor")
    return fingerprint.build(load_processor(model), bench.samples, rows, template, bench.settings.evaluate, **conditions)


def _journal(folder: Path, model: Path, *conditions: object) -> Path:
    """Path of the journal, named by a hash of everything that answers depend on: only an equal run resumes from it."""
    key = repr((sha256([model]), *conditions))
    return folder / f"answers-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
