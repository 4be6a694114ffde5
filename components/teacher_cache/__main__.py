"""Stage `cache_teacher`: the teacher's signals that do not depend on the student (those of KD and IVA), computed once.

python -m components.teacher_cache     artifacts/{dataset,models,teacher,irs} -> artifacts/signals

Where params/distill.yaml asks for the live teacher, it writes down that there are none.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from components.config.load import load_settings
from components.config.settings import Settings
from components.errors import ModelError
from components.io import sha256
from components.process import exit_from
from components.records.irs import LayerChoice
from components.records.models import ModelIndex
from components.records.paths import DATASET, MODELS, ROWS, SIGNALS, TEACHER
from components.records.teacher import TeacherChoice
from components.records.teacher_cache import SignalCache, SignalFacts, SignalManifest
from components.tracking.resumable import resumable

if TYPE_CHECKING:
    import torch

    from components.models.load import Loaded


def main() -> None:
    settings = load_settings()
    from components.tracking.stage_run import stage_run

    asked = settings.distill.teacher_signals
    with stage_run("cache_teacher", runtime=settings.runtime, params=asked.model_dump()) as run:
        if asked.source == "live":
            shutil.rmtree(SIGNALS, ignore_errors=True)
            SignalManifest(cache=None).write(SIGNALS / "manifest.json")
            print("cache_teacher: nothing to do, params/distill.yaml:teacher_signals.source is live")
            return
        cache = make(settings)
        run.metrics({"size_mib": cache.size_bytes / 2**20, "samples": cache.samples, "rows": cache.rows})
        for kind, error in cache.errors.items():
            run.metrics({f"{kind}/{name}": value for name, value in error.model_dump(exclude={"student"}).items()})
    print(closing_line(cache))


def make(settings: Settings) -> SignalCache:
    """Build the cache for these settings, from the shards that an interrupted run left, and put it in its place.

    Raises:
        ModelError: teacher and students are no pair (`check_pair`), or the students share different vocabularies with it.
        DataError: there is nothing to distil on, or two samples have the same id and text.
        TryAgainError: another process is making it.
    """
    from components.runtime import prepare_torch
    from components.teacher_cache.store import facts

    device = prepare_torch(settings.runtime, 0, settings.distill.precision)
    wanted = facts(settings)
    with resumable(SIGNALS, wanted, "components.teacher_cache.__main__") as draft:
        return _fill(draft, settings, wanted, device)


def _fill(folder: Path, settings: Settings, wanted: SignalFacts, device: torch.device) -> SignalCache:
    """Write shards and manifest into `folder`."""
    import torch

    from components.dataset.shards import Samples
    from components.irs.weighting import weighting
    from components.models.collate import Collator
    from components.models.load import check_layer, load
    from components.models.template import Template
    from components.models.vlm import VLM
    from components.teacher_cache.approximation import measure
    from components.teacher_cache.build import TeacherPass, build
    from components.teacher_cache.store import Signals

    precision = torch.bfloat16 if wanted.precision == "bf16" else torch.float32
    teacher = load(Path(TeacherChoice.read(TEACHER / "choice.json").path), device, precision)
    check_layer(teacher, wanted.layer)
    records = ModelIndex.read(MODELS / "index.json").students
    students = {name: load(Path(record.path), device) for name, record in sorted(records.items())}
    shared = _shared_vocabulary(teacher, students)
    template, longest = Template.asked(settings.models.template), settings.models.max_length
    collator = Collator(teacher.processor, template, longest, train=True, rows=wanted.rows)
    background = weighting(settings.distill.iva, LayerChoice.found()).background
    teacher_pass = TeacherPass(VLM(teacher.model), collator, wanted, shared, settings.distill.logits_chunk_mib, background)
    samples = Samples(DATASET, "train", ROWS)
    paths = build(teacher_pass, samples, settings.distill.micro_batch_size, folder)
    shards = {path.name: sha256([path]) for path in paths}
    signals = Signals(folder, shards)
    name, student = next(iter(students.items()))
    errors = measure(teacher_pass, signals, samples, VLM(student.model), name, settings.distill.micro_batch_size)
    cache = SignalCache(
        facts=wanted,
        shared_vocabulary=shared,
        dtype="float32" if teacher_pass.dtype == torch.float32 else "float16",
        samples=len(signals),
        rows=signals.rows,
        equal_weights=0 if background is None else signals.equal_weights,
        size_bytes=sum(path.stat().st_size for path in paths),
        shards=shards,
        errors=errors,
    )
    SignalManifest(cache=cache).write(folder / "manifest.json")
    return cache


def _shared_vocabulary(teacher: Loaded, students: dict[str, Loaded]) -> int:
    from components.models.load import check_pair

    shared = {name: check_pair(teacher, student) for name, student in students.items()}
    if len(set(shared.values())) > 1:
        raise ModelError(
            f"the students share vocabularies of different sizes with teacher {teacher.name} ({shared}), and one cache serves"
            " one of them; set teacher_signals.source to live in params/distill.yaml"
        )
    return next(iter(shared.values()))


def closing_line(cache: SignalCache) -> str:
    errors = "; ".join(
        f"{kind} {error.mean_error:.1e} nats on average ({error.relative_error:.2%} of KL), {error.max_error:.1e} at most,"
        f" {error.mean_mass_beyond:.2%} of mass beyond"
        for kind, error in cache.errors.items()
    )
    student = next(iter(cache.errors.values())).student
    equal = f"; no attention left for {cache.equal_weights:,} samples, whose weights are equal" if cache.equal_weights else ""
    k = min(cache.facts.top_k, cache.shared_vocabulary)
    return (
        f"cache_teacher: {k} of {cache.shared_vocabulary:,} tokens at {cache.rows:,} rows of {cache.samples:,} samples,"
        f" {cache.size_bytes / 2**20:,.1f} MiB in {SIGNALS}; error of KL(teacher || {student}): {errors}{equal}"
    )


if __name__ == "__main__":
    exit_from(main)
