"""One model measured one way: by the stage `evaluate`, by VLMEvalKit over a server, or by lm-eval in this process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from components.config.settings import Settings
from components.dataset.shards import Samples
from components.errors import DataError, InputError
from components.evaluate import fingerprint, metrics
from components.evaluate.__main__ import model_of
from components.evaluate.generate import questions
from components.evaluate.kits import export, lm_eval, scores, serve, vlmeval
from components.evaluate.kits.client import Endpoint
from components.evaluate.kits.scores import KitScores, Measured
from components.evaluate.kits.vlmeval_worker import JUDGE
from components.evaluate.load_results import read_predictions
from components.io import sha256
from components.models.checkpoint_folder import weight_files
from components.models.load import load_processor
from components.models.template import Template
from components.process import locked
from components.records.evaluate import Fingerprint, Scores
from components.records.models import ModelIndex
from components.records.paths import DATASET, MODELS, ROWS, SCORES
from components.runtime import prepare_torch

BEFORE = "before-"  # and the name of a student that nothing was distilled into yet
OURS = "our exact match"
TURNED = {  # tasks of ours for VLMEvalKit: our multiple choice with its options in the prompt
    "options": ("AlignTI_Options", export.write_options),  # in one drawn order per question
    "circular": ("AlignTI_Circular", export.write_turned),  # in every rotation; right only if right in all
}


@dataclass
class Bench:
    """The questions, the settings and the device; the same for every model and every way of measuring."""

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
    """All questions of the split to one model, through `kit`: "own", "vlmeval" or "lm-eval".

    Raises:
        ModelError, DataError: no such model, or no scores of the stage `evaluate` for it yet.
        InputError: the kit is not installed.
        TryAgainError: the kit or the server broke off; or another process measures the same. What was answered is kept.
    """
    way = {"own": _own, "vlmeval": _vlmeval, "lm-eval": _lm_eval}[kit]
    model = folder_of(arm)
    weight_files(model)
    return way(bench, arm, model)


def is_current(bench: Bench, found: KitScores) -> bool:
    """Whether measuring again would give the same: nothing that a score depends on has changed, and no question was refused."""
    if found.kit == "own" or found.failed:
        return False  # own: read from its stage's scores in no time
    asked = [row for row in bench.rows if bench.samples[row].image is not None]
    model = folder_of(found.arm)
    return found.fingerprint == _fingerprint(bench, model, asked, found.kit, *_kit_and_judge(found.kit))


def folder_of(arm: str) -> Path:
    """Raises InputError for `before-NAME` if there is no student NAME."""
    if not arm.startswith(BEFORE):
        return model_of(arm)
    students = ModelIndex.read(MODELS / "index.json").students
    name = arm.removeprefix(BEFORE)
    if name not in students:
        raise InputError(f"there is no student {name!r}; there are {', '.join(students)}")
    return Path(students[name].path)


def stock(bench: Bench, kit: str, arm: str, tasks: Sequence[str], blank: bool) -> dict[str, float]:
    """The kit's own benchmarks, or TSV files in VLMEvalKit's format: `task/figure` -> value. Raises as `measure`."""
    model = folder_of(arm)
    weight_files(model)
    asked = bench.settings.evaluate
    if kit == "lm-eval":
        journal = _journal(lm_eval.folder_of(arm), model, "stock", *tasks)
        return lm_eval.evaluate(
            model, bench.device, [], tasks, asked.batch_size, asked.max_new_tokens, journal, f"{arm}: lm-eval", bench.system
        ).figures
    if kit != "vlmeval":
        raise InputError("--task goes with --kit vlmeval or --kit lm-eval")
    files_alone = all(task.endswith(".tsv") or task in TURNED for task in tasks)
    using = vlmeval.kit(full=False) if files_alone else vlmeval.kit_for_benchmarks()
    folder = vlmeval.folder_of(arm)
    asked_for = [_turned(bench, folder, task) if task in TURNED else task for task in tasks]
    for task in asked_for:
        if task.endswith(".tsv"):
            vlmeval.checked(Path(task.rpartition("=")[2]))  # before a server is started
    journal = _journal(folder, model, using.version, asked.max_new_tokens, bench.system)
    with _alone(folder), _served(bench, model, folder) as endpoint:
        return vlmeval.score_tasks(using, endpoint, asked_for, folder, journal, asked.max_new_tokens, blank, f"{arm}: vlmeval")


@contextmanager
def _served(bench: Bench, model: Path, folder: Path) -> Iterator[Endpoint]:
    with serve.served(model, bench.device.type, folder / "server.log") as endpoint:
        yield endpoint._replace(system=bench.system)


def _turned(bench: Bench, folder: Path, task: str) -> str:
    """The file of one of TURNED. Raises InputError if the split has no multiple choice."""
    multiple = [found for found in export.sets(bench.samples, bench.rows)[0] if found.form == "mcq"]
    if not multiple:
        raise InputError(f"--task {task}: the {bench.settings.evaluate.split} split has no multiple choice")
    name, write = TURNED[task]
    return str(write(multiple[0], bench.samples, folder / "turned" / f"{name}.tsv", bench.settings.evaluate.seed))


def _own(bench: Bench, arm: str, model: Path) -> KitScores:
    found = Scores.read(SCORES / arm / "scores.json")
    predicted = read_predictions(SCORES / arm / "predictions.jsonl")
    return KitScores(
        arm=arm,
        kit="own",
        model=sha256([model]),
        samples=found.samples,
        exact_match=found.exact_match,
        per_kind=found.per_kind,
        ours=found.per_kind,
        judges=dict.fromkeys(found.per_kind, OURS),
        figures=_yes_no(found),
        disagreements=[],
        other_answers=[],
        empty=scores.empty(predicted),
        overlong=[],
        failed={},
        not_asked=[],
        seconds=0,
        fingerprint=found.fingerprint,
    )


def _vlmeval(bench: Bench, arm: str, model: Path) -> KitScores:
    started = time.monotonic()
    using = vlmeval.kit(full=False)
    sets, _ = export.sets(bench.samples, bench.rows)
    folder, new_tokens = vlmeval.folder_of(arm), bench.settings.evaluate.max_new_tokens
    journal = _journal(folder, model, using.version, new_tokens, bench.device.type, bench.system)
    with _alone(folder), _served(bench, model, folder) as endpoint:
        found = vlmeval.score_split(
            using, endpoint, bench.samples, sets, folder, journal, new_tokens, bench.settings.evaluate.seed, f"{arm}: vlmeval"
        )
    return _assembled(bench, arm, "vlmeval", model, found, time.monotonic() - started)


def _lm_eval(bench: Bench, arm: str, model: Path) -> KitScores:
    started = time.monotonic()
    version = lm_eval.installed()
    asked, folder = bench.settings.evaluate, lm_eval.folder_of(arm)
    journal = _journal(folder, model, version, asked.max_new_tokens, asked.batch_size, bench.device.type)
    tasks = [lm_eval.QUESTIONS, *lm_eval.TEXT]
    with _alone(folder):
        found = lm_eval.evaluate(
            model, bench.device, tasks, [], asked.batch_size, asked.max_new_tokens, journal, f"{arm}: lm-eval", bench.system
        )
    return _assembled(bench, arm, "lm-eval", model, found, time.monotonic() - started)


def _assembled(bench: Bench, arm: str, kit: str, model: Path, found: Measured, seconds: float) -> KitScores:
    """The record of a kit's run: its verdict counts where it has one, ours elsewhere; what is no answer is never right."""
    rows = [row for row in bench.rows if row in found.answers]
    if not rows:
        raise DataError(f"{arm}: {kit} cannot ask any of the {len(bench.rows)} questions: none has an image")
    version, judge = _kit_and_judge(kit)
    judged = {bench.samples[row].kind for row in found.verdicts}
    overlong = [bench.samples[row].id for row in found.overlong]
    failed = {bench.samples[row].id: reason for row, reason in found.failed.items()}
    out = {*found.overlong, *found.failed}
    samples = [bench.samples[row] for row in rows]
    predicted = metrics.predictions(samples, (found.answers[row] for row in rows))
    nothing = set(scores.empty(predicted))
    right = [
        found.verdicts.get(row, p.correct) and row not in out and p.id not in nothing
        for row, p in zip(rows, predicted, strict=True)
    ]
    kinds = sorted({p.kind for p in predicted})
    path = SCORES / arm / "predictions.jsonl"
    return KitScores(
        arm=arm,
        kit=kit,
        model=sha256([model]),
        samples=len(rows),
        exact_match=sum(right) / len(right),
        per_kind=scores.shares(predicted, right),
        ours=scores.shares(predicted, [p.correct for p in predicted]),
        judges={kind: f"the kit's {judge}" if kind in judged else OURS for kind in kinds},
        figures=found.figures,
        disagreements=scores.disagreements(predicted, right),
        other_answers=scores.other_answers(predicted, read_predictions(path)) if path.exists() else [],
        empty=sorted(nothing - set(failed) - set(overlong)),
        overlong=overlong,
        failed=failed,
        not_asked=[bench.samples[row].id for row in bench.rows if row not in found.answers],
        seconds=round(seconds, 1),
        fingerprint=_fingerprint(bench, model, rows, kit, version, judge),
    )


def _yes_no(found: Scores) -> dict[str, float]:
    figures = found.yes_no.get(metrics.OVERALL)
    return {f"yes_no/{name}": getattr(figures, name) for name in ("f1", "accuracy", "precision", "recall")} if figures else {}


def _fingerprint(bench: Bench, model: Path, rows: Sequence[int], kit: str, version: str, judge: str) -> Fingerprint:
    """Of a kit, which asks with the template that is saved with the model, whatever the settings say."""
    import transformers

    template = Template(bench.system, style="processor")
    return Fingerprint(
        kit=kit,
        kit_version=version,
        dataset=f"{bench.samples.manifest.source}/{bench.settings.evaluate.split}",
        dataset_hash=fingerprint.digest(shard.sha256 for shard in bench.samples.record.shards),
        prompt_hash=fingerprint.prompts(load_processor(model), bench.samples, rows, template),
        decoding={"do_sample": False, "max_new_tokens": bench.settings.evaluate.max_new_tokens},
        judge=judge,
        transformers=transformers.__version__,
        dtype=serve.DTYPE,
        device=bench.device.type,
    )


def _kit_and_judge(kit: str) -> tuple[str, str]:
    """The kit's version, with a digest of our bridge to it, and its judge."""
    here = Path(__file__).parent
    if kit == "vlmeval":
        bridge = sha256([here / "export.py", here / "vlmeval_worker.py"])
        return f"ms-vlmeval {vlmeval.kit(full=False).version}, bridge {bridge[:8]}", JUDGE
    bridge = sha256([here / "lm_eval.py", here / "lm_eval_tasks.py", lm_eval.TASKS])
    return f"lm-eval {lm_eval.installed()}, bridge {bridge[:8]}", "exact_match"


def _journal(folder: Path, model: Path, *facts: object) -> Path:
    """Named by all that answers depend on, so that only a run that would get the same goes on from it."""
    told = repr((sha256([model]), *facts))
    return folder / f"answers-{hashlib.sha256(told.encode()).hexdigest()[:16]}.jsonl"


def _alone(folder: Path) -> AbstractContextManager[None]:
    """One process at a time in a kit's folder. Raises TryAgainError while another is there."""
    return locked(folder / "lock", "another process measures this arm")
