"""Assembly of one training job: student, teacher or its cache, distillation module, samples and sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

from components.align_ti.step import AlignTI, Method
from components.config.distill import DistillSettings
from components.config.settings import Settings
from components.config.study import Arm
from components.dataset.shards import CAPTION, Samples
from components.distill import code
from components.distill.launch import check_world
from components.distill.placement import load_teacher
from components.distill.resample_visual_tokens import ResampledTeacher
from components.distill.rollouts import Rollouts
from components.distill.sampler import Sampler
from components.distill.teacher import FrozenTeacher, same_tower
from components.distill.trainable import choose_trainable
from components.errors import DataError, ModelError
from components.io import fingerprint, sha256
from components.irs.weighting import Weighting, weighting
from components.models.collate import Collator
from components.models.load import Loaded, check_images, check_layer, check_pair, check_same_template, grids, load
from components.models.template import Template
from components.models.vlm import VLM
from components.records.irs import LayerChoice
from components.records.models import ModelIndex, ModelRecord
from components.records.paths import ANSWERS, DATASET, IRS, MODELS, ROWS, SIGNALS, TEACHER
from components.records.teacher import TeacherChoice
from components.runtime import prepare_torch
from components.teacher_answers.store import Answers
from components.teacher_answers.store import facts as answer_facts
from components.teacher_cache.evidence import Evidence, ImageDependence
from components.teacher_cache.evidence import collator as evidence_collator
from components.teacher_cache.store import Signals, read_evidence, read_manifest
from components.teacher_cache.store import facts as signal_facts


@dataclass(frozen=True)
class Job:
    """Inputs of `loop.train` and `export` for one arm."""

    name: str
    settings: Settings
    facts: dict[str, Any]  # inputs that determine the student's bytes, for its card and the fingerprint of checkpoints
    start: ModelRecord  # the student before distillation
    choice: TeacherChoice | None  # None: stage align
    student: Loaded
    module: AlignTI
    samples: Samples
    collator: Collator
    order: Sampler
    accelerator: Accelerator
    rollouts: Rollouts | None
    answers: Answers | None
    evidence: list[Evidence | ImageDependence]

    @property
    def title(self) -> str:
        return f"distill@{self.name}"

    @property
    def distill(self) -> DistillSettings:
        return self.settings.distill

    @property
    def fingerprint(self) -> str:
        """Identity of the checkpoints: an interrupted training resumes only under an equal fingerprint."""
        logging = {"steps_logged": self.distill.log_every}
        return fingerprint({**self.facts, **logging}, code.training_files(self.module.method.weights))


def assemble(name: str, arm: Arm, settings: Settings) -> Job:
    """Job of one arm on this process's device. Raises DataError or ModelError if its parts are incompatible."""
    settings = settings.of_arm(arm)
    accelerator = _accelerator(arm, settings)
    samples = Samples(DATASET, "train", ROWS)
    is_align = settings.distill.stage == "align"
    choice = None if is_align else TeacherChoice.read(TEACHER / "choice.json")
    layers = None if is_align else layer_search_result(arm)
    students = ModelIndex.read(MODELS / "index.json").students
    if arm.student not in students:
        raise ModelError(f"{MODELS / 'index.json'} has no student {arm.student!r}; `dvc repro obtain_models` makes it")
    start = students[arm.student]
    facts = _facts(arm, settings, samples, choice, layers, start)

    student = load(Path(start.path), accelerator.device)
    choose_trainable(student, settings.distill)
    template = Template.from_settings(settings.models.template)
    collator = Collator(student.processor, template, settings.models.max_length, train=True)
    if choice is None:
        check_images(student)
        module = AlignTI(VLM(student.model), None, _method(arm, settings.distill, collator, student.vocabulary))
    elif settings.uses_cache(arm):
        module = _cached(arm, settings, student, collator, samples)
        facts["teacher_signals"] = settings.distill.teacher_signals.model_dump()
    else:
        if settings.distill.teacher_signals.source == "cache":
            term_names = " and ".join(f"L_{term}" for term, needs in arm.needs.items() if needs.live_teacher)
            accelerator.print(f"distill@{name}: no cache serves {term_names}; this arm runs the live teacher for all its terms")
        teacher = load_teacher(Path(choice.path), accelerator.device, settings)
        check_same_template(teacher, student, settings.models.template)
        sides = grids(teacher, student)
        if sides is not None:
            accelerator.print(
                f"distill@{name}: the teacher sees an image on {sides[0]} x {sides[0]} tokens, the student on {sides[1]} x"
                f" {sides[1]}; its rows there and the weights of L_iva are interpolated bilinearly to the student's grid"
            )
        assert arm.iva is not None  # filled in by Settings.arm
        layer_weighting = weighting(arm.iva, layers, teacher.layers, arm.seed)
        teacher_processor = teacher.processor if sides is not None else None
        collator = Collator(
            student.processor,
            template,
            settings.models.max_length,
            train=True,
            teacher=teacher_processor,
            rows=layer_weighting.rows,
        )
        module = _live(arm, settings.distill, student, teacher, layer_weighting, collator, sides)
    indices, answers = training_indices(samples.kinds, settings.distill), None
    if arm.answers is not None:
        answers = Answers(ANSWERS, answer_facts(settings), arm.answer_filter)
        facts["teacher_answers"] = answers.manifest.model_dump()
        indices = answers.answered(indices)
    evidence: list[Evidence | ImageDependence] = []
    if module.method.needs.evidence:
        manifest, method_terms = read_evidence(SIGNALS, signal_facts(settings)), cast(Any, module.method.weighted_terms)
        facts["evidence"] = manifest.model_dump()
        if mcd := method_terms.get("mcd"):
            edit_collator = evidence_collator(student.processor, template, settings.models.max_length)
            evidence.append(edits := Evidence(SIGNALS, manifest, mcd.evidence, mcd.verified, samples, edit_collator))
            edited = sum(index in edits for index in indices)
            remedy = (
                "" if edited else ", and is 0 in every step; raise rows in params/distill.yaml, or set mcd.verified to null"
            )
            accelerator.print(f"distill@{name}: L_mcd edits {edited:,} of {len(indices):,} samples{remedy}")
        if (va_kd := method_terms.get("va_kd")) and va_kd.cached:
            evidence.append(ImageDependence(SIGNALS, manifest, va_kd.by))
    weights = samples.weights
    order = Sampler(indices, settings.distill.batch_size, arm.seed, weights and [weights[i] for i in indices])
    rollouts = None
    if arm.rollouts is not None:
        shared_vocabulary = module.method.shared_vocabulary or student.vocabulary
        rollouts = Rollouts(arm.rollouts, student, collator, samples, order, shared_vocabulary, accelerator)
    accelerator.print(
        f"distill@{name}: {len(indices):,} samples of {len(samples):,}; {collator.decoded_text(samples[indices[0]])}"
    )
    return Job(
        name,
        settings,
        facts,
        start,
        choice,
        student,
        module,
        samples,
        collator,
        order,
        accelerator,
        rollouts,
        answers,
        evidence,
    )


def _accelerator(arm: Arm, settings: Settings) -> Accelerator:
    device = prepare_torch(settings.runtime, arm.seed, settings.distill.precision)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if settings.distill.precision == "bf16" else "no",
        # Overrides the environment: ACCELERATE_GRADIENT_ACCUMULATION_STEPS silently divides the loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    check_world(accelerator, settings.runtime)
    return accelerator


def _facts(
    arm: Arm, settings: Settings, samples: Samples, choice: TeacherChoice | None, layers: LayerChoice | None, start: ModelRecord
) -> dict[str, Any]:
    facts = {
        "arm": arm.model_dump(mode="json"),
        "distill": settings.distill.model_dump(
            mode="json",
            exclude={"iva", "tpa", "divergence", "teacher_signals", "teacher_answers", "log_every", *settings.distill.blocks},
        ),
        "template": settings.models.template.model_dump(mode="json"),
        "dataset": samples.manifest.digest,
        "rows": sha256([ROWS / "train.npy"]),  # what `check_rows` left out or cut
        "max_length": settings.models.max_length,
        "teacher": {"name": choice.name, "sha256": choice.sha256} if choice else None,
        "irs_layer": layers.layer if layers else None,
        "student": {"name": start.name, "sha256": start.sha256},
    }
    if samples.sources is not None:
        facts["weights"] = {name: source.weight for name, source in samples.sources.items()}
    assert arm.iva is not None  # filled in by Settings.arm
    if layers is not None and arm.iva.weighting == "searched" and "iva" in arm.needs:
        selection = layers.picked.model_dump(include={"rule", "layer", "weighting", "rows"})
        facts["searched"] = selection | {"background": weighting(arm.iva, layers).digest}
    return facts


def layer_search_result(arm: Arm) -> LayerChoice | None:
    """Result of the layer search, None without one. Raises DataError if the arm needs a layer and the search found none."""
    return LayerChoice.read(IRS / "layer.json") if arm.needs_layer else LayerChoice.read_if_searched()


def training_indices(kinds: Sequence[str], distill: DistillSettings) -> list[int]:
    """Indices of the training samples: captions for stage align (all samples if none is a caption), else all but captions.

    Cut to `distill.rows` evenly spaced ones, the same for every arm and seed. Raises DataError if none is left.
    """
    captions = [i for i, kind in enumerate(kinds) if kind == CAPTION]
    if distill.stage == "align":
        eligible = captions or list(range(len(kinds)))
    else:
        eligible = [i for i, kind in enumerate(kinds) if kind != CAPTION]
    if not eligible:
        raise DataError(f"all training samples are of kind {CAPTION!r}, which stage align alone trains on: name another `kind`")
    count = min(distill.rows or len(eligible), len(eligible))
    return [eligible[position * len(eligible) // count] for position in range(count)]


def _live(
    arm: Arm,
    distill: DistillSettings,
    student: Loaded,
    teacher: Loaded,
    layer_weighting: Weighting,
    collator: Collator,
    sides: tuple[int, int] | None,
) -> AlignTI:
    """Distillation module with a live teacher. Raises ModelError if the pair is incompatible or the layer does not exist."""
    check_layer(teacher, layer_weighting.layer)
    depths = student.layers, teacher.layers
    method = _method(arm, distill, collator, check_pair(teacher, student, own_images=sides is not None), depths)
    student_vlm, teacher_vlm = VLM(student.model), VLM(teacher.model)
    if method.needs.linear and (student_vlm.head.cap or teacher_vlm.head.cap):
        names = ", ".join(name for name, term in method.weighted_terms.items() if term.needs.linear)
        raise ModelError(
            f"L_{names} needs the logits to be linear in the hidden states; Gemma 2 soft-caps them: give it no weight"
        )
    appends_ribbon = method.route == "expanded" and method.needs.ribbon
    if distill.flex_attention and appends_ribbon and student.model.device.type == "cuda" and student_vlm.can_flex:
        student_vlm.flex()
    shares_tower = sides is None and not distill.trainable.vision_tower and same_tower(student_vlm, teacher_vlm)
    frozen = FrozenTeacher(
        teacher_vlm, layer_weighting.layer, shares_tower, layer_weighting.background, layer_weighting.gradient
    )
    return AlignTI(student_vlm, frozen if sides is None else ResampledTeacher(frozen, *sides), method)


def _cached(arm: Arm, settings: Settings, student: Loaded, collator: Collator, samples: Samples) -> AlignTI:
    """Distillation module with cached teacher signals, if a term needs them. Raises DataError if the cache does not match."""
    signals, shared = None, student.vocabulary
    if any(needs.teacher for needs in arm.needs.values()):
        cache = read_manifest(SIGNALS, signal_facts(settings))
        signals, shared = Signals(SIGNALS, cache.shards), cache.shared_vocabulary
        if arm.iva is not None and arm.iva.of_another:
            rows = [row for row, kind in zip(samples.row_of.tolist(), samples.kinds, strict=True) if kind != CAPTION]
            signals.substitute_attention(arm.iva.of_another, rows)
    return AlignTI(VLM(student.model), None, _method(arm, settings.distill, collator, shared), signals)


def _method(
    arm: Arm, distill: DistillSettings, collator: Collator, shared_vocabulary: int, depths: tuple[int, int] | None = None
) -> Method:
    assert arm.tpa is not None and arm.divergence is not None  # filled in by Settings.arm
    return Method(
        weights=arm.weights,
        options=arm.options,
        **arm.divergence.model_dump(),
        chunk_mib=distill.logits_chunk_mib,
        **arm.tpa.model_dump(exclude={"divergence"}),
        eos=collator.eos_id,
        shared_vocabulary=shared_vocabulary,
        route="expanded" if distill.gradient_checkpointing else "continuation",
        depths=depths,
    )
