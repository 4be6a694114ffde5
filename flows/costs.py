"""Cost of a full-size run by the cost model: device hours, memory, disk, downloads.

Nothing is measured here. docs/recipes.md says how far the model was from what was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from components import cost, shapes
from components.align_ti.terms import CORE, needs_of
from components.config import recipes
from components.config.models import Checkpoint, Cut, Parts
from components.config.recipes import SampleSize
from components.config.settings import Settings
from components.config.study import Arm
from components.cost import DEVICES, GIB, Device, Holding, Model, Way, Work
from components.errors import InputError

STUDENT_PATH = re.compile(r"artifacts/students/([a-z0-9_-]+)/model")
IMAGE_BYTES, PREPARED_PER_SECOND = 67e3, 488  # from the prepare benchmark (docs/performance.md), two cores
EMBEDDED_VOCABULARY, EMBEDDED_TOKENS = 128, (10, 8)  # digits: vocabulary, tokens of question and answer
TEACHER_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5}

# What is published of data: rows and, where it is known, bytes to download.
ROWS = {
    "share-captioner_coco_lcs_sam_1246k_1107.json": 1_246_000,
    "MobileVLM_V2_FT_Mix2M.json": 2_428_000,
    "blip_laion_cc_sbu_558k.json": 558_000,
    "llava_v1_5_mix665k.json": 665_000,
}
DATA_BYTES = {"data/llava/pretrain": 27_356_108_382, "data/mix2m/MobileVLM_V2_FT_Mix2M.json": 1.4e9}

# arXiv 2602.09483, its table of costs: Qwen2.5-0.5B taught by 7B, one epoch. It names no device and no batch per device.
PAPER, PAPER_HOURS = "paper-qwen2.5-0.5b", {"kd": 355, "align_ti": 509}


@dataclass(frozen=True)
class Estimate:
    """Of one run: all of a pipeline's stages, each arm a stage of its own."""

    device: Device
    devices: int
    hours: dict[str, float]  # stage -> device hours
    memory: dict[str, float]  # part -> peak bytes per device, maximum over arms
    disk: dict[str, float]  # part -> bytes
    cpu_hours: float  # hours of `prepare`, on two cores

    @property
    def device_hours(self) -> float:
        return sum(self.hours.values())

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> seconds on all devices. Answering runs on one."""
        shared = {stage: self.devices if stage.startswith("distill") else 1 for stage in self.hours}
        return {"prepare": 3600 * self.cpu_hours} | {stage: 3600 * h / shared[stage] for stage, h in self.hours.items()}

    @property
    def gib(self) -> float:
        return sum(self.memory.values()) / GIB


@dataclass(frozen=True)
class Missing:
    """Something that a run reads and that is not on this machine."""

    what: str
    size: float | None  # bytes, where known
    terms: str
    get: str


def estimate(name: str, settings: Settings, root: Path = Path()) -> Estimate | None:
    """Of `settings`, as near to recipe `name`; None if the recipe has nothing for the cost model to go by.

    Raises InputError if the shape of one of the models is known neither here nor from a folder.
    """
    about = recipes.about(name, root)
    if about.device is None or about.sample is None or settings.models.pretrained is None:
        return None
    device, sample = DEVICES[about.device], about.sample
    members = settings.models.pretrained
    teachers = {member: _model(entry, name, settings, root) for member, entry in members.teachers.items()}
    students = {member: _model(entry, name, settings, root) for member, entry in members.students.items()}
    teacher = next(iter(teachers.values()), None)
    distill, runtime = settings.distill, settings.runtime
    rows = distill.steps * distill.batch_size
    tested = _share(settings) * rows
    hours: dict[str, float] = {}
    if teacher is not None:
        prompt = teacher.visual + sample.text
        written = min(settings.evaluate.max_new_tokens, sample.response)
        batch = settings.evaluate.batch_size
        hours["select_teacher"] = sum(
            cost.answering(each, settings.teacher.samples, batch, prompt, written, device) for each in teachers.values()
        )
        looked = settings.irs.images * settings.irs.instructions_per_image
        hours["search_layer"] = cost.answering(teacher, looked, settings.irs.batch_size, prompt, 0, device)
        hours["evaluate_teacher"] = cost.answering(teacher, tested, batch, prompt, written, device)
    held: dict[str, dict[str, float]] = {}
    for arm_name in settings.study.arms:
        arm = settings.arm(arm_name)
        student = students[arm.student]
        work, way = _work(student, sample, settings), _way(student, arm, settings)
        passes = distill.batch_size / len(work.lengths)
        asked = teacher if any(needs.teacher for needs in arm.needs.values()) else None
        one = cost.step(student, asked, work, way)
        hours[f"distill@{arm_name}"] = distill.steps * passes * cost.hours(one, device)
        prompt, written = student.visual + sample.text, min(settings.evaluate.max_new_tokens, sample.response)
        hours[f"evaluate@{arm_name}"] = cost.answering(student, tested, settings.evaluate.batch_size, prompt, written, device)
        held[arm_name] = cost.memory(student, asked, work, way, _holding(student, settings))
    dearest = max(held.values(), key=lambda parts: sum(parts.values()))
    arms = [students[arm.student] for arm in settings.study.arms.values()]
    disk = {
        "models to start from": 2.0 * sum(model.weights for model in [*teachers.values(), *students.values()]),
        "students": 4.0 * sum(model.weights for model in arms),
        "a checkpoint": max(4.0 * model.weights + 8.0 * _trained(model, settings) for model in arms),
        "prepared images": rows * IMAGE_BYTES,
    }
    return Estimate(device, runtime.devices, hours, dearest, disk, rows / PREPARED_PER_SECOND / 3600)


def paper_hours(root: Path = Path()) -> dict[str, tuple[float, float]]:
    """Arm of the paper's recipe -> device hours by the cost model, GPU hours that the paper reports."""
    found = estimate(PAPER, recipes.settings_with(PAPER, root), root)
    assert found is not None
    return {arm: (found.hours[f"distill@{arm}"], hours) for arm, hours in PAPER_HOURS.items()}


def _model(entry: Checkpoint | Parts | Cut, name: str, settings: Settings, root: Path) -> Model:
    """The shape of one entry of params/models.yaml. A folder's own config.json comes before what this project knows."""
    if isinstance(entry, Cut):
        assert settings.models.pretrained is not None
        whole = _model(settings.models.pretrained.teachers[entry.teacher], name, settings, root)
        language = whole.language
        kept = replace(language, layers=math.ceil(language.layers / entry.every), mlp=entry.mlp or language.mlp)
        return replace(whole, language=kept)
    if isinstance(entry, Parts):
        tower = shapes.TOWERS.get(entry.tower.source)
        language_model = shapes.LANGUAGE_MODELS.get(entry.language_model.source)
        if tower is None or language_model is None:
            raise InputError(
                f"the shape of {entry.tower.source} or of {entry.language_model.source} is none that this project knows"
                " (components/shapes.py)"
            )
        return shapes.llava(tower, language_model)
    folder = downloaded(entry, root)
    if folder is not None and (found := shapes.of_folder(folder)) is not None:
        return found
    if entry.source in shapes.MODELS:
        return shapes.MODELS[entry.source]
    made = STUDENT_PATH.fullmatch(entry.source)
    for phase in recipes.phases(name, root) if made else ():
        run = f"{name.partition('/')[0]}/{phase}"
        earlier = recipes.settings_with(run, root)
        if made and made[1] in earlier.study.arms and earlier.models.pretrained is not None:
            start = earlier.models.pretrained.students[earlier.study.arms[made[1]].student]
            return _model(start, run, earlier, root)
    raise InputError(f"the shape of {entry.source} is not known before it is here; `dvc repro obtain_models` brings it")


def downloaded(entry: Checkpoint, root: Path = Path()) -> Path | None:
    """The folder of a checkpoint that is on this machine."""
    if entry.revision is None:
        folder = root / Path(entry.source).expanduser()
    else:
        folder = hub_cache() / f"models--{entry.source.replace('/', '--')}" / "snapshots" / entry.revision
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _work(student: Model, sample: SampleSize, settings: Settings) -> Work:
    """One pass on one device: samples of the mean size."""
    distill = settings.distill
    B = min(distill.micro_batch_size, max(1, distill.batch_size // settings.runtime.devices))
    length = float(student.visual + sample.text + sample.response)
    return Work(
        lengths=(length,) * B,
        response=B * sample.response,
        visual=B * student.visual,
        images=B,
        instruction=B * sample.text,
        ribbon=B * sample.response * min(cost.ALTERNATIVES, settings.distill.tpa.draws),
    )


def _way(student: Model, arm: Arm, settings: Settings) -> Way:
    distill = settings.distill
    several = distill.batch_size > distill.micro_batch_size * settings.runtime.devices
    return Way(
        terms=tuple(arm.needs.values()),
        trained=float(distill.trainable.language_model and distill.trainable.lora is None),
        draws_first=several or distill.gradient_checkpointing,
        checkpointed=distill.gradient_checkpointing,
        chunk_rows=_chunk_rows(student, settings),
        towers=3 if distill.trainable.vision_tower else 1,
    )


def _holding(student: Model, settings: Settings) -> Holding:
    distill, runtime = settings.distill, settings.runtime
    precision = distill.precision if distill.teacher_weights == "same" else distill.teacher_weights
    sharded = {"student"} if (runtime.accelerate or "").startswith(("fsdp", "deepspeed")) else set()
    return Holding(
        trained=_trained(student, settings),
        wide=2 if distill.precision == "bf16" else 4,
        teacher_bytes=TEACHER_BYTES[precision],
        checkpointed=distill.gradient_checkpointing,
        chunk_rows=_chunk_rows(student, settings),
        continues=not distill.gradient_checkpointing,
        devices=runtime.devices,
        sharded=frozenset(sharded | ({"teacher"} if runtime.teacher_sharded else set())),
    )


def _chunk_rows(student: Model, settings: Settings) -> float:
    return settings.distill.logits_chunk_mib * 2**20 / (4 * student.language.vocabulary)


def _trained(model: Model, settings: Settings) -> float:
    """Parameters."""
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
    """Of the data that are answered in an evaluation, by the samples of training."""
    block = settings.data.mixture or settings.data.llava
    if block is None or settings.data.source == "digits":
        return 0.0
    return (block.test if settings.evaluate.split == "test" else block.val) / (1 - block.val - block.test)


def scaled_seconds(settings: Settings, base: Settings, measured: Mapping[str, float]) -> dict[str, float]:
    """Seconds per stage of an embedded recipe, from those `measured` of another, by the ratio of operations.

    An upper bound where `settings` is the larger: more of a tiny model's time goes into calls.
    """
    here, there = _embedded_operations(settings), _embedded_operations(base)
    return {stage: seconds * here[stage] / there[stage] for stage, seconds in measured.items()}


def _embedded_operations(settings: Settings) -> dict[str, float]:
    """Per stage, up to a factor that depends on no setting; images, for `prepare`."""
    family, digits = settings.models.embedded, settings.data.digits
    assert family is not None and digits is not None
    shape = family.tower
    px = digits.grid * digits.cell_px
    tower = cost.Tower(shape.hidden, shape.layers, shape.heads, shape.mlp, image_px=px, patch_px=shape.patch_px)
    teachers, students = (
        [shapes.llava(tower, cost.Language(t.hidden, t.layers, t.heads, t.kv_heads, t.mlp, EMBEDDED_VOCABULARY)) for t in made]
        for made in (family.teachers.values(), family.students.values())
    )

    def sample(turns: int) -> Work:
        text, response = turns * EMBEDDED_TOKENS[0], turns * EMBEDDED_TOKENS[1]
        return Work((float(tower.tokens + text + response),), response, tower.tokens, 1, text, response * cost.ALTERNATIVES)

    def training(model: Model, work: Work) -> float:
        return cost.step(model, None, work, Way(needs_of(["sft"]), towers=0)).all

    captions, instructions = family.teacher_captions, family.teacher_instructions
    described = sample(digits.grid**2 // 2)
    made = family.tower_training.steps * family.tower_training.batch_size * 3 * cost.tower(teachers[0], 1)
    for model in teachers:
        made += captions.steps * captions.batch_size * training(model, described)
        made += instructions.steps * instructions.batch_size * training(model, sample(instructions.turns))
    for model in students:
        made += family.student_captions.steps * family.student_captions.batch_size * training(model, described)
    teacher, student = max(teachers, key=lambda model: model.weights), students[0]
    one = cost.step(student, teacher, sample(digits.turns_per_row), Way(needs_of(CORE))).all
    asked = digits.images.test * digits.instructions_per_image.test
    images = digits.images
    return {
        "prepare": images.train + images.val + images.test,
        "obtain_models": made,
        "check_rows": images.train + images.val + images.test,
        "select_teacher": settings.teacher.samples * sum(cost.body(model, sample(1), 0) for model in teachers),
        "search_layer": settings.irs.images * settings.irs.instructions_per_image * cost.body(teacher, sample(1), 0),
        "cache_teacher": 1.0,  # a note that there is none
        "terms": 1.0,
        "distill": settings.distill.steps * settings.distill.batch_size * one,
        "evaluate": asked * cost.body(student, sample(1), 0),
        "evaluate_teacher": asked * cost.body(teacher, sample(1), 0),
        "compare": float(asked * len(settings.study.arms)),
    }


def missing(settings: Settings, root: Path = Path()) -> list[Missing]:
    """What the run reads and does not find here, without asking any network."""
    return [*_missing_models(settings, root), *_missing_data(settings, root)]


def _missing_models(settings: Settings, root: Path) -> Iterator[Missing]:
    if settings.models.family != "pretrained" or settings.models.pretrained is None:
        return
    entries = [*settings.models.pretrained.teachers.values(), *settings.models.pretrained.students.values()]
    wanted = [
        each
        for entry in entries
        for each in ((entry.tower, entry.language_model) if isinstance(entry, Parts) else (entry,))
        if isinstance(each, Checkpoint)
    ]
    for checkpoint in dict.fromkeys(wanted):
        if downloaded(checkpoint, root) is not None:
            continue
        source = checkpoint.source
        if checkpoint.revision is None:
            yield Missing(source, None, "yours", "put it there; an earlier run makes it if it lies under artifacts/students")
            continue
        terms = f"{shapes.LICENCES[source]}; not gated" if source in shapes.LICENCES else "see its page"
        yield Missing(
            f"{source}@{checkpoint.revision[:8]}", shapes.download_bytes(source), terms, "obtain_models fetches it from the hub"
        )


def _missing_data(settings: Settings, root: Path) -> Iterator[Missing]:
    data = settings.data
    if data.source == "llava" and data.llava is not None:
        for path in (data.llava.annotations, data.llava.images):
            if not _is_there(str(path), root):
                yield Missing(str(path), None, "yours", "put it there (docs/data.md)")
    if data.source != "mixture" or data.mixture is None:
        return
    for source in data.mixture.sources.values():
        fetched = source.files.startswith("hf://")
        if not _is_there(source.files, root):
            get = "prepare fetches it from the hub" if fetched else "put it there (params/mixtures/)"
            rows = ROWS.get(source.files.rpartition("/")[2])
            what = source.files.removeprefix("hf://datasets/")
            counted = f", {rows:,} rows" if rows else ""
            yield Missing(
                re.sub("@([0-9a-f]{8})[0-9a-f]{32}", r"@\1", what) + counted, DATA_BYTES.get(source.files), source.licence, get
            )
        if source.images is not None and not _is_there(str(source.images), root):
            yield Missing(
                f"{source.images} (images)",
                DATA_BYTES.get(str(source.images)),
                source.licence,
                "put them there (params/mixtures/)",
            )


def _is_there(named: str, root: Path) -> bool:
    """A file, a folder with something in it, a pattern that finds something, or a file of the hub's cache."""
    if hub := re.fullmatch(r"hf://datasets/([^/]+)/([^@]+)@([0-9a-f]{40})/(.+)", named):
        org, name, commit, file = hub.groups()
        return any((hub_cache() / f"datasets--{org}--{name}" / "snapshots" / commit).glob(file))
    if "*" in named:
        return any(root.glob(named))
    path = root / named
    return any(path.iterdir()) if path.is_dir() else path.exists()
