"""Stage `cache_teacher`: teacher signals that do not depend on the student (for KD and IVA), and what its answers rest on (for
L_mcd and L_va_kd).

python -m components.teacher_cache     artifacts/{dataset,models,rows,teacher,irs} -> artifacts/signals

With a live teacher and no evidence in params/distill.yaml, the manifest records that there are none.
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
from components.records.teacher_cache import EvidenceKept, SignalCache, SignalFacts, SignalManifest
from components.tracking.resumable import resumable

if TYPE_CHECKING:
    from components.dataset.shards import Samples
    from components.models.load import Loaded


def main() -> None:
    settings = load_settings()
    from components.align_ti.image_dependence import EDITS
    from components.tracking.stage_run import stage_run

    options = settings.distill.teacher_signals
    with stage_run("cache_teacher", runtime=settings.runtime, params=options.model_dump()) as run:
        if options.source == "live" and options.evidence is None:
            shutil.rmtree(SIGNALS, ignore_errors=True)
            SignalManifest(cache=None).write(SIGNALS / "manifest.json")
            print("cache_teacher: nothing to do, params/distill.yaml:teacher_signals.source is live")
            return
        manifest = build_signals(settings)
        if (cache := manifest.cache) is not None:
            run.metrics({"size_mib": cache.size_bytes / 2**20, "samples": cache.samples, "rows": cache.rows})
            for kind, error in cache.errors.items():
                run.metrics({f"{kind}/{name}": value for name, value in error.model_dump(exclude={"student"}).items()})
            print(closing_line(cache))
        if (evidence := manifest.evidence) is not None:
            for evidence_kind, count in evidence.right.items():
                effect = evidence.effect[evidence_kind]
                run.metrics({f"evidence/{evidence_kind}/samples": count, f"evidence/{evidence_kind}/effect": effect})
                print(
                    f"cache_teacher: a {evidence_kind} image takes {effect:.3f} nats from a token of {count:,} samples' answers"
                    if evidence_kind in EDITS
                    else f"cache_teacher: {evidence_kind} evidence of {count:,} of {evidence.asked:,} samples, those that the"
                    f" teacher answers as the data do; without it p moves {effect:+.3f} nats further than without all else"
                )


def build_signals(settings: Settings) -> SignalManifest:
    """Build cache and evidence for these settings, resuming from the shards of an interrupted run, and move them into place.

    Raises:
        ModelError: teacher and students are incompatible (`check_pair`, `check_same_template`), or their shared vocabularies
            differ in size.
        DataError: no instruction to distil on, or two samples with the same id and text.
        TryAgainError: another process holds the lock.
    """
    import torch

    from components.dataset.shards import Samples
    from components.models.load import check_same_template, load
    from components.runtime import prepare_torch
    from components.teacher_cache.store import facts

    device, options = prepare_torch(settings.runtime, 0, settings.distill.precision), settings.distill.teacher_signals
    expected_facts = facts(settings)
    batching = settings.distill.model_dump(include={"micro_batch_size", "logits_chunk_mib"})
    with resumable(SIGNALS, expected_facts, "components.teacher_cache.__main__", **batching) as draft:
        precision = torch.bfloat16 if expected_facts.precision == "bf16" else torch.float32
        teacher = load(Path(TeacherChoice.read(TEACHER / "choice.json").path), device, precision)
        records = ModelIndex.read(MODELS / "index.json").students
        students = {name: load(Path(record.path), device) for name, record in sorted(records.items())}
        for student in students.values():
            check_same_template(teacher, student, settings.models.template)
        args = (draft, settings, expected_facts, teacher, students, Samples(DATASET, "train", ROWS))
        manifest = SignalManifest(
            cache=_signals(*args) if options.source == "cache" else None,
            evidence=_evidence(*args) if options.evidence else None,
        )
        manifest.write(draft / "manifest.json")
    return manifest


def _signals(
    folder: Path, settings: Settings, facts: SignalFacts, teacher: Loaded, students: dict[str, Loaded], samples: Samples
) -> SignalCache:
    import torch

    from components.irs.weighting import weighting
    from components.models.collate import Collator
    from components.models.load import check_layer
    from components.models.template import Template
    from components.models.vlm import VLM
    from components.teacher_cache.approximation import measure
    from components.teacher_cache.build import TeacherPass, build
    from components.teacher_cache.store import Signals

    check_layer(teacher, facts.layer)
    shared_vocabulary = _shared_vocabulary(teacher, students)
    template, max_length = Template.from_settings(settings.models.template), settings.models.max_length
    collator = Collator(teacher.processor, template, max_length, train=True, rows=facts.rows)
    background = weighting(settings.distill.iva, LayerChoice.read_if_searched()).background
    teacher_pass = TeacherPass(
        VLM(teacher.model), collator, facts, shared_vocabulary, settings.distill.logits_chunk_mib, background
    )
    paths = build(teacher_pass, samples, settings.distill.micro_batch_size, folder)
    shards = {path.name: sha256([path]) for path in paths}
    signals = Signals(folder, shards)
    name, student = next(iter(students.items()))
    errors = measure(teacher_pass, signals, samples, VLM(student.model), name, settings.distill.micro_batch_size)
    return SignalCache(
        facts=facts,
        shared_vocabulary=shared_vocabulary,
        dtype="float32" if teacher_pass.dtype == torch.float32 else "float16",
        samples=len(signals),
        rows=signals.rows,
        equal_weights=0 if background is None else signals.equal_weights,
        size_bytes=sum(path.stat().st_size for path in paths),
        shards=shards,
        errors=errors,
    )


def _evidence(
    folder: Path, settings: Settings, facts: SignalFacts, teacher: Loaded, students: dict[str, Loaded], samples: Samples
) -> EvidenceKept:
    from safetensors.torch import load_file

    from components.align_ti.image_dependence import EDITS
    from components.models.template import Template
    from components.models.vlm import VLM
    from components.teacher_cache.evidence import collator
    from components.teacher_cache.find_evidence import DependencePass, EvidencePass, find

    options = settings.distill.teacher_signals.evidence
    assert options is not None
    shared_vocabulary = _shared_vocabulary(teacher, students)
    collate = collator(teacher.processor, Template.from_settings(settings.models.template), settings.models.max_length)
    vlm = VLM(teacher.model).eval().requires_grad_(False)
    size, bf16 = settings.distill.micro_batch_size, facts.precision == "bf16"
    edits, others = ([kind for kind in options.kinds if (kind in EDITS) == is_edit] for is_edit in (True, False))
    evidence_pass = EvidencePass(vlm, collate, samples, others, options.share, shared_vocabulary, bf16)
    dependence_pass = DependencePass(vlm, collate, samples, edits, shared_vocabulary, bf16)
    paths, asked = find(evidence_pass, size, folder)
    paths |= find(dependence_pass, size, folder)[0]
    effects = {kind: [e for path in files for e in load_file(path)["effects"].tolist()] for kind, files in paths.items()}
    return EvidenceKept(
        facts=facts,
        asked=asked,
        right={kind: len(values) for kind, values in effects.items()},
        effect={kind: sum(values) / max(1, len(values)) for kind, values in effects.items()},
        shards={kind: {path.name: sha256([path]) for path in files} for kind, files in paths.items()},
    )


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
    is_sampled = cache.facts.kind == "sampled"
    errors = "; ".join(
        f"{kind} {error.mean_error:.1e} nats on average ({error.relative_error:.2%} of KL), {error.max_error:.1e} at most,"
        + (f" bias {error.bias:.1e}" if is_sampled else f" {error.mean_mass_beyond:.2%} of mass beyond")
        for kind, error in cache.errors.items()
    )
    student = next(iter(cache.errors.values())).student
    equal = f"; no attention left for {cache.equal_weights:,} samples, whose weights are equal" if cache.equal_weights else ""
    stored = f"{cache.facts.draws} draws" if is_sampled else f"{min(cache.facts.top_k, cache.shared_vocabulary)}"
    return (
        f"cache_teacher: {stored} of {cache.shared_vocabulary:,} tokens at {cache.rows:,} rows of {cache.samples:,} samples,"
        f" {cache.size_bytes / 2**20:,.1f} MiB in {SIGNALS}; error of KL(teacher || {student}): {errors}{equal}"
    )


if __name__ == "__main__":
    exit_from(main)
