"""Estimated cost of a full-size run: device hours, memory, disk.

Nothing is measured here; docs/recipes.md compares the model with measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from components.config import recipes
from components.config.data import HeldOut
from components.config.local_paths import downloaded
from components.config.models import Checkpoint, Cut, LanguageShape, Parts
from components.config.recipes import SampleSize
from components.config.settings import Settings
from components.config.study import Arm
from components.cost import shapes, step
from components.cost.downloads import STUDENT_PATH
from components.cost.shapes import Model
from components.cost.step import DEVICES, GIB, BatchShape, Device, MemoryPlan, Operations, StepPlan
from components.errors import InputError

IMAGE_BYTES, PREPARED_PER_SECOND = 67e3, 488  # prepare benchmark (docs/performance.md): its images, on two cores
TEACHER_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5}
DIGITS_WORDS = 74  # vocabulary of recipe `digits`; its tokenizer is built from the prepared data, perhaps not there yet


@dataclass(frozen=True)
class Estimate:
    """Cost of one run: all stages of a pipeline, each arm a stage of its own."""

    device: Device
    devices: int
    hours: dict[str, float]  # stage -> device hours
    memory: dict[str, float]  # part -> peak bytes per device, of the arm that needs most
    disk: dict[str, float]  # part -> bytes
    cpu_hours: float  # `prepare`, on two cores

    @property
    def device_hours(self) -> float:
        return sum(self.hours.values())

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> wall-clock seconds: training on all devices, generation on one."""
        shared = {stage: self.devices if stage.startswith("distill") else 1 for stage in self.hours}
        return {"prepare": 3600 * self.cpu_hours} | {stage: 3600 * h / shared[stage] for stage, h in self.hours.items()}

    @property
    def gib(self) -> float:
        return sum(self.memory.values()) / GIB


def estimate(name: str, settings: Settings, root: Path = Path()) -> Estimate | None:
    """Cost of `settings`, with device and mean sample of recipe `name`; None if it has none, or without a block `pretrained`.

    Raises InputError if the shape of a model is neither in `shapes` nor in a local folder.
    """
    about = recipes.about(name, root)
    if about.device is None or about.sample is None or settings.models.pretrained is None:
        return None
    device, sample, members = DEVICES[about.device], about.sample, settings.models.pretrained
    teachers = {member: _model(entry, name, settings, root) for member, entry in members.teachers.items()}
    students = {member: _model(entry, name, settings, root) for member, entry in members.students.items()}
    teacher = next(iter(teachers.values()), None)
    distill, evaluate, runtime = settings.distill, settings.evaluate, settings.runtime
    rows = distill.steps * distill.batch_size
    test_rows = _share(settings) * rows

    def generation_hours(model: Model, questions: float, batch: int, prompt: float, max_new_tokens: int) -> float:
        return step.generation_hours(model, questions, batch, prompt, min(max_new_tokens, sample.response), device)

    hours: dict[str, float] = {}
    if teacher is not None:
        prompt, new_tokens, batch = teacher.visual + sample.text, evaluate.max_new_tokens, evaluate.batch_size
        candidate_hours = [
            generation_hours(candidate, settings.teacher.samples, batch, prompt, new_tokens) for candidate in teachers.values()
        ]
        hours["select_teacher"] = sum(candidate_hours)
        search_prompts = settings.irs.images * settings.irs.instructions_per_image
        hours["search_layer"] = generation_hours(teacher, search_prompts, settings.irs.batch_size, prompt, 0)
        if (answer_settings := distill.teacher_answers) is not None:
            hours["write_answers"] = generation_hours(
                teacher, answer_settings.samples * rows, distill.micro_batch_size, prompt, answer_settings.max_new_tokens
            )
        if distill.teacher_signals.source == "cache":
            length = teacher.visual + sample.text + sample.response
            batch_shape = BatchShape((length,), response=sample.response, visual=teacher.visual, images=1)
            head = step.head(teacher.language, sample.response + teacher.visual)
            one_pass = step.tower(teacher, 1) + step.body(teacher, batch_shape, 0) + head
            hours["cache_teacher"] = rows * step.hours(Operations(one_pass, 0), device)
        hours["evaluate_teacher"] = generation_hours(teacher, test_rows, batch, prompt, new_tokens)
    memory_by_arm: list[dict[str, float]] = []
    for arm_name in settings.study.arms:
        arm = settings.arm(arm_name)
        student, live_teacher = students[arm.student], None if settings.uses_cache(arm) else teacher
        shape, plan = _batch_shape(student, sample, arm, settings), _step_plan(student, arm, settings)
        steps, passes = settings.of_arm(arm).distill.steps, distill.batch_size / len(shape.lengths)
        flops = step.operations(student, live_teacher, shape, replace(plan, written=0))  # answers' time is added below
        distill_hours = steps * passes * step.hours(flops, device)
        prompt = student.visual + sample.text
        if arm.rollouts is not None:
            answers, rollout_batch = arm.rollouts.share * steps * distill.batch_size, _samples_per_device(settings)
            distill_hours += generation_hours(student, answers, rollout_batch, prompt, arm.rollouts.max_new_tokens)
        hours[f"distill@{arm_name}"] = distill_hours
        hours[f"evaluate@{arm_name}"] = generation_hours(
            student, test_rows, evaluate.batch_size, prompt, evaluate.max_new_tokens
        )
        memory_by_arm.append(step.memory(student, live_teacher, shape, plan, _memory_plan(student, settings)))
    peak_memory = max(memory_by_arm, key=lambda parts: sum(parts.values()))
    arms = [students[arm.student] for arm in settings.study.arms.values()]
    disk = {
        "models to start from": 2.0 * sum(model.weights for model in [*teachers.values(), *students.values()]),
        "students": 4.0 * sum(model.weights for model in arms),
        "a checkpoint": max(4.0 * model.weights + 8.0 * _trained(model, settings) for model in arms),
        "prepared images": rows * IMAGE_BYTES,
    }
    return Estimate(device, runtime.devices, hours, peak_memory, disk, rows / PREPARED_PER_SECOND / 3600)


def step_operations(name: str, arm: Arm, settings: Settings, root: Path = Path()) -> float:
    """FLOPs of one optimiser step of a filled-in arm, over samples of recipe `name`'s mean size. The teacher is the largest
    candidate, and costs nothing where the arm reads its cache.

    Raises InputError if the recipe lacks that size, or the shape of a model is unknown.
    """
    sample = recipes.about(name, root).sample
    if sample is None:
        raise InputError(f"params/recipes/{name}.yaml: about.sample is missing, the tokens of a mean sample")
    members = settings.models.members
    student = _model(members.students[arm.student], name, settings, root)
    teacher = max((_model(entry, name, settings, root) for entry in members.teachers.values()), key=lambda model: model.weights)
    shape, plan = _batch_shape(student, sample, arm, settings), _step_plan(student, arm, settings)
    operations = step.operations(student, None if settings.uses_cache(arm) else teacher, shape, plan)
    return settings.distill.batch_size / len(shape.lengths) * operations.all


def _model(entry: Checkpoint | Parts | Cut | LanguageShape, name: str, settings: Settings, root: Path) -> Model:
    """Shape of one entry of params/models.yaml. A folder's own config.json takes precedence over the table in `shapes`."""
    if isinstance(entry, LanguageShape):
        assert settings.models.embedded is not None and settings.data.digits is not None  # this family learns the digits
        embedded_tower, image_px = settings.models.embedded.tower, settings.data.digits.grid * settings.data.digits.cell_px
        tower_shape = shapes.Tower(**embedded_tower.model_dump(exclude={"cell_px"}), image_px=image_px)
        return shapes.llava(tower_shape, shapes.Language(**entry.model_dump(), vocabulary=DIGITS_WORDS))
    if isinstance(entry, Cut):
        assert settings.models.pretrained is not None
        teacher = _model(settings.models.pretrained.teachers[entry.teacher], name, settings, root)
        language = teacher.language
        pruned_language = replace(language, layers=math.ceil(language.layers / entry.every), mlp=entry.mlp or language.mlp)
        return replace(teacher, language=pruned_language)
    if isinstance(entry, Parts):
        tower = shapes.TOWERS.get(entry.tower.source)
        language_model = shapes.LANGUAGE_MODELS.get(entry.language_model.source)
        if tower is None or language_model is None:
            raise InputError(
                f"the shape of {entry.tower.source} or of {entry.language_model.source} is none that this project knows"
                " (components/cost/shapes.py)"
            )
        return shapes.llava(tower, language_model)
    folder = downloaded(entry, root)
    if folder is not None and (shape := shapes.load_shape(folder)) is not None:
        return shape
    if entry.source in shapes.MODELS:
        return shapes.MODELS[entry.source]
    student_path = STUDENT_PATH.fullmatch(entry.source)
    for phase in recipes.phases(name, root) if student_path else ():
        run = f"{name.partition('/')[0]}/{phase}"
        phase_settings = recipes.settings_with(run, root)
        if student_path and student_path[1] in phase_settings.study.arms and phase_settings.models.pretrained is not None:
            student = phase_settings.models.pretrained.students[phase_settings.study.arms[student_path[1]].student]
            return _model(student, run, phase_settings, root)
    raise InputError(f"the shape of {entry.source} is not known before it is here; `dvc repro obtain_models` brings it")


def _batch_shape(student: Model, sample: SampleSize, arm: Arm, settings: Settings) -> BatchShape:
    """Micro-batch of one device: samples of the mean size."""
    assert arm.tpa is not None  # filled in by Settings.arm
    alternatives = 0 if arm.tpa.source == "gold" else min(step.ALTERNATIVES, arm.tpa.draws)  # gold alternatives add no rows
    B = min(settings.distill.micro_batch_size, _samples_per_device(settings))
    length = float(student.visual + sample.text + sample.response)
    return BatchShape(
        lengths=(length,) * B,
        response=B * sample.response,
        visual=B * student.visual,
        images=B,
        instruction=B * sample.text,
        ribbon=B * sample.response * alternatives,
    )


def _samples_per_device(settings: Settings) -> int:
    return max(1, settings.distill.batch_size // settings.runtime.devices)


def _step_plan(student: Model, arm: Arm, settings: Settings) -> StepPlan:
    distill = settings.distill
    accumulates = distill.batch_size > distill.micro_batch_size * settings.runtime.devices
    return StepPlan(
        terms=tuple(arm.needs.values()),
        trained=float(distill.trainable.language_model and distill.trainable.lora is None),
        draws_first=accumulates or distill.gradient_checkpointing,
        checkpointed=distill.gradient_checkpointing,
        chunk_rows=distill.logits_chunk_mib * 2**20 / (4 * student.language.vocabulary),
        towers=3 if distill.trainable.vision_tower else 1,
        edited=(arm.options["mcd"].get("verified", 0.5) or 1.0) if "mcd" in arm.weights else 0.0,
        written=0.0 if arm.rollouts is None else arm.rollouts.share,
        gradient=arm.iva is not None and arm.iva.weighting == "gradient" and "iva" in arm.weights,
        visual=_visual_share(student, arm),
    )


def _visual_share(student: Model, arm: Arm) -> float:
    """Share of an image's rows with logits: those that L_iva draws, unless its weights or another term need all."""
    assert arm.iva is not None  # filled in by Settings.arm
    readers = [term for term, needs in arm.needs.items() if needs.visual]
    if arm.iva.rows is None or readers != ["iva"] or arm.iva.weighting in ("entropy", "divergence"):
        return 1.0
    return min(1.0, arm.iva.rows / student.visual)


def _memory_plan(student: Model, settings: Settings) -> MemoryPlan:
    distill, runtime = settings.distill, settings.runtime
    precision = distill.precision if distill.teacher_weights == "same" else distill.teacher_weights
    sharded = {"student"} if (runtime.accelerate or "").startswith(("fsdp", "deepspeed")) else set()
    return MemoryPlan(
        trained=_trained(student, settings),
        wide=2 if distill.precision == "bf16" else 4,
        teacher_bytes=TEACHER_BYTES[precision],
        devices=runtime.devices,
        sharded=frozenset(sharded | ({"teacher"} if runtime.teacher_sharded else set())),
    )


def _trained(model: Model, settings: Settings) -> float:
    """Number of trained parameters."""
    trainable = settings.distill.trainable
    lora, shape = trainable.lora, model.language
    adapters = 0 if lora is None else shape.layers * len(lora.targets) * 2 * lora.rank * shape.hidden
    language = shape.weights if lora is None else adapters
    return (
        trainable.vision_tower * model.tower.weights
        + trainable.projector * model.projector
        + trainable.language_model * language
    )


def _share(settings: Settings) -> float:
    """Evaluated samples as a share of the training samples."""
    block = getattr(settings.data, settings.data.source)
    if not isinstance(block, HeldOut):
        return 0.0
    return (block.test if settings.evaluate.split == "test" else block.val) / (1 - block.val - block.test)
