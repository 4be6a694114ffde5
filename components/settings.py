"""What may be asked for: the schema of every file in `params/`, read strictly and checked all at once.

No field has a hidden default: the YAML files are the whole truth of a run, which is what lets DVC decide from them
alone what is stale. `params/runtime.yaml` holds what does not change results (devices, addresses); no stage depends on it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails

from components.align_ti import terms
from components.artifacts import TEACHER_ARM, Attention, Rows
from components.errors import SettingsError

QUICK = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it: a tenth of the time
Ratio = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=64)]
ArmName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]  # no dots: DVC reads `arms.NAME`
IntRange = Annotated[tuple[int, int], Field(strict=False, description="[lowest, highest], both included")]
FloatRange = Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False, description="[lowest, highest]")]
Byte = Annotated[int, Field(ge=0, le=255)]
Rgb = Annotated[tuple[Byte, Byte, Byte], Field(strict=False)]


class Strict(BaseModel):
    """Unknown keys, NaN and silent conversions (`"3"` for 3) are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# --- params/data.yaml -------------------------------------------------------------------------------------------------


class SplitSizes(Strict):
    train: PositiveInt
    val: PositiveInt
    test: PositiveInt


class Augmentation(Strict):
    """How one digit's drawing varies; each value is drawn evenly from its range."""

    shift_px: NonNegative = Field(description="largest displacement along each axis, pixels of the composed image")
    scale: FloatRange = Field(description="size relative to the cell")
    rotation_deg: NonNegative = Field(description="largest rotation to either side, degrees")
    brightness: FloatRange = Field(description="share of the colour's full brightness")


class DigitsGrid(Strict):
    """The visual question set composed from UCI handwriting (`source: digits`)."""

    grid: Annotated[int, Field(gt=0, le=9)] = Field(description="cells per side")
    cell_px: PositiveInt = Field(description="pixels per side of a cell")
    filled: IntRange = Field(description="number of cells that hold a digit; the others are empty")
    classes: IntRange = Field(description="number of different digits that an image draws from, of the ten")
    colours: IntRange = Field(description="number of different colours that an image draws from, of the palette")
    palette: dict[Annotated[str, Field(pattern=r"^[a-z]+$")], Rgb] = Field(description="colour word -> red, green, blue")
    texture: Ratio = Field(description="largest brightness of the smooth colour clouds behind the digits, share of full")
    noise: Ratio = Field(description="standard deviation of the noise on every pixel, share of full brightness")
    augmentation: Augmentation
    handwriting: SplitSizes = Field(description="raw digit images per split; they sum to at most 1,797")
    images: SplitSizes = Field(description="composed images per split")
    instructions_per_image: SplitSizes = Field(description="questions per composed image, at least 2; train adds two captions")
    turns_per_row: PositiveInt = Field(description="questions in one conversation of the train split, at most")

    @model_validator(mode="after")
    def _consistent(self) -> DigitsGrid:
        most = {"filled": min(self.grid**2, 18), "classes": 10, "colours": len(self.palette)}
        for field, highest in most.items():
            low, high = getattr(self, field)
            if not 1 <= low <= high <= highest:
                raise ValueError(f"{field} {[low, high]} must be [lowest, highest] within 1..{highest}")
        if sum((self.handwriting.train, self.handwriting.val, self.handwriting.test)) > 1797:
            raise ValueError("handwriting splits sum to more than the 1,797 digits of the UCI set")
        if min(self.instructions_per_image.model_dump().values()) < 2:
            raise ValueError("instructions_per_image must be at least 2: IRS compares instructions on one image")
        return self


class LlavaFolder(Strict):
    """A user's own LLaVA-format JSON / JSONL and image folder (`source: llava`)."""

    annotations: Path = Field(strict=False, description="JSON list or JSONL of {id, image, conversations}")
    images: Path = Field(strict=False, description="folder that the rows' image paths are relative to, or tar files: `x/*.tar`")
    val: Share = Field(description="share of images that go to the validation split")
    test: Share = Field(description="share of images that go to the test split")

    @model_validator(mode="after")
    def _train_left(self) -> LlavaFolder:
        _leave_some_to_train(self.val, self.test)
        return self


class MixtureSource(Strict):
    """One source of a mixture; `files` says by its ending what it is."""

    files: str = Field(
        description="x.json or x.jsonl (LLaVA), x/*.tar (WebDataset), x/*.parquet, or hf://datasets/ORG/NAME@COMMIT/x"
    )
    images: Path | None = Field(strict=False, description="for LLaVA files: their folder of images, or tar files `x/*.tar`")
    weight: PositiveFloat = Field(description="times that each sample stands in an epoch of training, on average")
    licence: str = Field(min_length=1, description="goes into the data card and the student's")


class Mixture(Strict):
    """Several sources in one data set (`source: mixture`)."""

    val: Share = Field(description="share of images that go to the validation split")
    test: Share = Field(description="share of images that go to the test split")
    near_duplicates: Literal["report", "drop"] = Field(description="training images that look like an evaluated one")
    evaluation_images: list[Path] = Field(
        strict=False, description="folders of benchmarks' images, evaluated on as val and test are"
    )
    sources: dict[Name, MixtureSource] = Field(min_length=1)

    @model_validator(mode="after")
    def _train_left(self) -> Mixture:
        _leave_some_to_train(self.val, self.test)
        return self


def _leave_some_to_train(val: float, test: float) -> None:
    if val + test >= 1:
        raise ValueError(f"val {val} + test {test} leave nothing to train on")


class DataLimits(Strict):
    max_pixels: PositiveInt = Field(description="an image with more pixels is quarantined before it is decoded")
    max_image_mib: PositiveFloat = Field(description="an image file that is larger is quarantined before it is read, MiB")
    max_text_chars: PositiveInt = Field(description="characters of all turns of one conversation")
    max_bad_ratio: Ratio = Field(description="share of quarantined rows past which the stage stops")


class DataSettings(Strict):
    source: Literal["digits", "llava", "mixture"]
    seed: int
    images_per_shard: PositiveInt
    limits: DataLimits
    digits: DigitsGrid | None
    llava: LlavaFolder | None
    mixture: Mixture | None

    @model_validator(mode="after")
    def _block_of_source(self) -> DataSettings:
        if getattr(self, self.source) is None:
            raise ValueError(f"source is {self.source}, so the block `{self.source}:` must be filled in")
        return self


# --- params/models.yaml -----------------------------------------------------------------------------------------------


class Optimiser(Strict):
    """AdamW with linear warm-up and cosine decay to zero."""

    learning_rate: PositiveFloat
    betas: Annotated[tuple[float, float], Field(strict=False)]  # YAML has lists, not tuples
    weight_decay: NonNegative
    warmup_ratio: Ratio = Field(description="share of steps")
    max_grad_norm: PositiveFloat


class TowerShape(Strict):
    """SigLIP-shaped vision tower; one visual token per patch. Captions describe cells of `cell_px`, whole patches each."""

    hidden: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    mlp: PositiveInt
    patch_px: PositiveInt
    cell_px: PositiveInt = Field(description="side of what three words of a caption describe, whole patches")

    @model_validator(mode="after")
    def _whole_patches(self) -> TowerShape:
        if self.cell_px % self.patch_px:
            raise ValueError(f"cell_px {self.cell_px} is not a multiple of patch_px {self.patch_px}")
        return self


class LanguageShape(Strict):
    """Qwen-shaped language model."""

    hidden: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    mlp: PositiveInt


class Training(Strict):
    steps: PositiveInt
    batch_size: PositiveInt
    optimiser: Optimiser


class TowerTraining(Training):
    noise: Ratio = Field(description="Gaussian noise added to the pixels, as a share of full brightness")
    label_smoothing: Ratio


class Conversations(Training):
    turns: PositiveInt = Field(description="questions about one image in one training sample, at most")


class EmbeddedFamily(Strict):
    """The tiny family that `obtain_models` builds and trains from nothing, on the prepared data."""

    seed: int
    tower: TowerShape
    tower_training: TowerTraining
    teachers: dict[Name, LanguageShape]
    teacher_captions: Training
    teacher_instructions: Conversations
    students: dict[Name, LanguageShape] = Field(description="each has learnt captions alone, as after the paper's stage 1")
    student_captions: Training


class Checkpoint(Strict):
    """A hub id at a pinned commit, or a local folder (revision null)."""

    source: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None


class Parts(Strict):
    """LLaVA from its parts, as the paper's models are: a tower, a fresh two-layer projector, a language model."""

    tower: Checkpoint = Field(description="SigLIP: its vision tower and image processor")
    language_model: Checkpoint = Field(description="Qwen2, Qwen2.5 or Qwen3")
    feature_layer: int = Field(description="the tower's layer that is read: -2 the last but one, as METHOD.md has it")
    seed: int = Field(description="of the projector's weights")


class Cut(Strict):
    """A teacher less some of its language model's layers and neurons; everything else is copied."""

    teacher: Name = Field(description="one of `teachers`")
    every: PositiveInt = Field(description="of L layers keep 0, every, 2 every, ...; 1: all of them")
    mlp: PositiveInt | None = Field(description="neurons kept in each MLP, those of the largest weights; null: all of them")


_MEMBERS: dict[str, type[Strict]] = {  # by tags of the unions below, which are no keys of a YAML file
    "(checkpoint)": Checkpoint,
    "(parts)": Parts,
    "(cut)": Cut,
}


def _kind(entry: Any) -> str:
    """Which of `_MEMBERS` an entry is, by its keys; a checkpoint if they say nothing."""
    return next((kind for kind, keys in _keys_by_kind(entry).items() if keys), "(checkpoint)")


def _keys_by_kind(entry: Any) -> dict[str, list[str]]:
    keys = entry.model_fields_set if isinstance(entry, Strict) else entry if isinstance(entry, dict) else ()
    return {kind: [key for key in keys if key in model.model_fields] for kind, model in _MEMBERS.items()}


def _one_of(*kinds: str) -> BeforeValidator:
    """One sentence for an entry that mixes kinds, where pydantic would list keys missing here and unknown there."""

    def check(entry: Any) -> Any:
        found = {kind: keys for kind, keys in _keys_by_kind(entry).items() if keys}
        if len(found) > 1 or not found.keys() <= set(kinds):
            said = " and ".join(f"{', '.join(keys)} {kind}" for kind, keys in found.items())
            forms = " or ".join(f"{{{', '.join(_MEMBERS[kind].model_fields)}}}" for kind in kinds)
            raise ValueError(f"has {said}; give {forms}")
        return entry

    return BeforeValidator(check)


_Checkpoint = Annotated[Checkpoint, Tag("(checkpoint)")]
_Parts = Annotated[Parts, Tag("(parts)")]
_Cut = Annotated[Cut, Tag("(cut)")]
Whole = Annotated[_Checkpoint | _Parts, Discriminator(_kind), _one_of("(checkpoint)", "(parts)")]
Start = Annotated[_Checkpoint | _Parts | _Cut, Discriminator(_kind), _one_of(*_MEMBERS)]


class PretrainedFamily(Strict):
    teachers: dict[Name, Whole] = Field(description="none for `stage: align`")
    students: dict[Name, Start]

    @model_validator(mode="after")
    def _cut_from_teachers(self) -> PretrainedFamily:
        for name, student in self.students.items():
            if isinstance(student, Cut) and student.teacher not in self.teachers:
                known = ", ".join(self.teachers) or "there are none"
                raise ValueError(f"students.{name}.teacher: {student.teacher!r} is none of the teachers ({known})")
        return self


class Template(Strict):
    style: Literal["vicuna", "processor"] = Field(description="the paper's | each checkpoint's own chat template")
    system: str = Field(description="text before the first turn; may be empty")


class ModelsSettings(Strict):
    family: Literal["embedded", "pretrained"]
    template: Template
    max_length: PositiveInt = Field(description="tokens of one sample, visual tokens included")
    too_long: Literal["cut", "leave_out"] = Field(description="longer samples: keep the whole turns that fit, or none")
    refused_images: Literal["resize", "leave_out"] = Field(description="images of a shape that a processor refuses")
    image_splitting: bool = Field(description="false: Idefics3 and SmolVLM take each image as one tile")
    embedded: EmbeddedFamily | None
    pretrained: PretrainedFamily | None

    @model_validator(mode="after")
    def _block_of_family(self) -> ModelsSettings:
        if getattr(self, self.family) is None:
            raise ValueError(f"family is {self.family}, so the block `{self.family}:` must be filled in")
        if not self.image_splitting and self.family == "embedded":
            raise ValueError("image_splitting: false is for `family: pretrained`; embedded models split no image")
        return self

    @property
    def members(self) -> EmbeddedFamily | PretrainedFamily:
        chosen = self.embedded if self.family == "embedded" else self.pretrained
        assert chosen is not None
        return chosen


# --- params/teacher.yaml ----------------------------------------------------------------------------------------------


class TeacherSettings(Strict):
    """Rule: best exact match among the candidates within the limits; among those within `tie_margin`, the smallest."""

    seed: int
    samples: PositiveInt = Field(description="validation samples that each candidate answers")
    min_exact_match: Ratio | None
    max_parameters: PositiveInt | None
    max_seconds_per_1000: PositiveFloat | None
    max_memory_mib: PositiveFloat | None
    tie_margin: Ratio


# --- params/irs.yaml --------------------------------------------------------------------------------------------------


class IrsSettings(Strict):
    seed: int
    images: PositiveInt = Field(description="training-split images with two or more instructions")
    instructions_per_image: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt
    overlays: PositiveInt = Field(description="pictures of where two instructions look")
    rule: Literal["irs", "pointing", "given"] = Field(description="what picks the weights of `weighting: searched`")
    layer: Annotated[int, Field(ge=0)] | None = Field(description="for rule: given")
    weighting: Attention | None = Field(description="mean, as in the paper, or centred; null: whichever points best")
    instruction_rows: Rows | None = Field(description="all, or the question's words; null: whichever point best")

    @model_validator(mode="after")
    def _what_the_rule_needs(self) -> IrsSettings:
        if (self.rule == "given") != (self.layer is not None):
            raise ValueError("`layer` is for `rule: given`, and only for it")
        if self.rule != "pointing" and None in (self.weighting, self.instruction_rows):
            raise ValueError(f"`rule: {self.rule}` needs `weighting` and `instruction_rows`; null is for `rule: pointing`")
        return self


# --- params/distill.yaml ----------------------------------------------------------------------------------------------


class WithTerms(Strict):
    """Beside its fields: the options of loss terms, each term's in a block of its name (align_ti/terms)."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="wrap")
    @classmethod
    def _no_other_names(cls, raw: Any, fields: Callable[[Any], Self]) -> Self:
        """Beside the problems of the fields: a misspelt one would else be told as missing alone."""
        other = set(raw if isinstance(raw, dict) else ()) - {*cls.model_fields, *terms.names()}
        problems = [InitErrorDetails(type="extra_forbidden", loc=(name,), input=raw[name]) for name in sorted(other, key=str)]
        try:
            made = fields(raw)
        except ValidationError as error:
            for found in error.errors():
                if found["loc"] == () or found["loc"][0] not in other:
                    problems.append(
                        InitErrorDetails(type=found["type"], loc=found["loc"], input=found["input"], ctx=found.get("ctx", {}))
                    )
        if problems:
            raise ValidationError.from_exception_data("params", problems)
        return made

    @model_validator(mode="after")
    def _options_of_terms(self) -> Self:
        for name, block in self.blocks.items():
            if name in terms.names():
                _check_options(name, block)
        return self

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        return self.model_extra or {}


def _check_options(name: str, block: Any) -> None:
    """Raises ValidationError where a term's own dataclass has no such field, or another type, or refuses the value."""
    term = terms.term_class(name)
    hints = {**get_type_hints(term), "divergence": Divergence | None}
    options: dict[str, Any] = {
        field.name: (hints[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(term)
    }
    try:
        term(**create_model(name, __base__=Strict, **options).model_validate(_tuples(block)).model_dump())
    except ValidationError as error:
        (problem, *_) = error.errors()
        raise _refused(problem["type"], (name, *problem["loc"]), problem["input"], problem.get("ctx", {})) from None
    except ValueError as error:
        raise _refused("value_error", (name,), block, {"error": error}) from None


def _refused(kind: str, loc: tuple[int | str, ...], value: Any, context: dict[str, Any] | None = None) -> ValidationError:
    details = InitErrorDetails(type=kind, loc=loc, input=value, ctx=context or {})
    return ValidationError.from_exception_data("params", [details])


def _tuples(value: Any) -> Any:
    """YAML's lists as the tuples that frozen dataclasses hold."""
    if isinstance(value, dict):
        return {key: _tuples(inside) for key, inside in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class Divergence(Strict):
    """Per-row divergence D(teacher, student) in nats; `mix` is JSD's beta or the skew's alpha."""

    kind: Literal["forward", "reverse", "jsd", "skewed"]
    mix: Ratio
    temperature: PositiveFloat


class Iva(Strict):
    """Weights over visual tokens: attention (mean, all rows) at the IRS layer or at a given one; equal; or what the rule of
    params/irs.yaml picks."""

    weighting: Literal["irs", "searched", "layer", "uniform"]
    layer: Annotated[int, Field(ge=0)] | None = Field(description="for weighting: layer")
    divergence: Divergence | None = Field(default=None, description="null: the arm's")

    @model_validator(mode="after")
    def _layer_given(self) -> Iva:
        if (self.weighting == "layer") != (self.layer is not None):
            raise ValueError("`layer` is for `weighting: layer`, and only for it")
        return self


class Tpa(Strict):
    """Alternatives drawn at each response step."""

    draws: PositiveInt
    source: Literal["student", "teacher", "gold"]
    replacement: bool
    draw_temperature: PositiveFloat = Field(description="of the distribution drawn from; the divergence has its own")
    top_k: PositiveInt | None = Field(description="draw among so many of the most likely tokens; null: among all")
    top_p: Share | None = Field(description="draw among the fewest tokens whose probabilities reach this; null: among all")
    max_expanded_length: PositiveInt | None = Field(
        description="tokens of one sample with its alternatives; beyond it some response steps, at random, get none"
    )
    divergence: Divergence | None = Field(default=None, description="null: the arm's")

    @model_validator(mode="after")
    def _enough_to_draw(self) -> Tpa:
        if not self.replacement and (self.top_p is not None or (self.top_k or self.draws) < self.draws):
            raise ValueError("drawing without replacement needs `top_k` of at least `draws`, or none, and no `top_p`")
        return self


class TeacherSignals(Strict):
    """Where KD and IVA hear the teacher: in a pass of its own at every step, or from the cache that `cache_teacher` makes."""

    source: Literal["live", "cache"]
    top_k: PositiveInt = Field(description="for the cache: likeliest tokens kept per row, with the mass of all others")


class Lora(Strict):
    """Low-rank adapters in the language model, folded into its weights at the end."""

    rank: PositiveInt
    alpha: PositiveInt = Field(description="the adapters' output is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: list[str] = Field(min_length=1, description="names of modules of a decoder layer: q_proj, ...")


class Trainable(Strict):
    vision_tower: bool
    projector: bool
    language_model: bool
    lora: Lora | None = Field(description="the language model through adapters alone; null: its own weights")

    @model_validator(mode="after")
    def _of_something(self) -> Trainable:
        if self.lora is not None and not self.language_model:
            raise ValueError("lora trains the language model, and language_model is false")
        if not (self.vision_tower or self.projector or self.language_model):
            raise ValueError("nothing is trained: vision_tower, projector and language_model are all false")
        return self


class LearningRates(Strict):
    """Of the parts that are trained; null: the optimiser's."""

    vision_tower: PositiveFloat | None
    projector: PositiveFloat | None
    language_model: PositiveFloat | None


class DistillSettings(WithTerms):
    stage: Literal["align", "distill"] = Field(description="align: captions, cross-entropy alone, no teacher")
    rows: PositiveInt | None = Field(description="of the train split that students learn from, evenly spaced; null: all")
    steps: PositiveInt
    batch_size: PositiveInt = Field(description="samples per optimiser step, over all ranks and accumulation steps")
    micro_batch_size: PositiveInt = Field(description="samples per forward pass on one device, at most")
    micro_batch_tokens: PositiveInt | None = Field(
        description="tokens per forward pass, padding included: passes hold samples of like length; null: micro_batch_size"
    )
    optimiser: Optimiser
    learning_rates: LearningRates
    precision: Literal["fp32", "bf16"]
    divergence: Divergence
    iva: Iva
    tpa: Tpa
    teacher_signals: TeacherSignals
    trainable: Trainable
    teacher_weights: Literal["same", "fp32", "bf16", "int8", "nf4"] = Field(description="same: as `precision`")
    gradient_checkpointing: bool
    flex_attention: bool = Field(
        description="with gradient_checkpointing on CUDA: FlexAttention over the sequence with its alternatives; else SDPA"
    )
    compile: bool = Field(description="torch.compile of the student's decoder layers")
    logits_chunk_mib: PositiveFloat = Field(
        description="MiB of float32 logits per chunk of rows, of one model: the losses' memory (about six such) against speed"
    )
    log_every: PositiveInt
    checkpoint_every: PositiveInt

    @model_validator(mode="after")
    def _batches(self) -> DistillSettings:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        return self

    @model_validator(mode="after")
    def _rates_of_what_is_trained(self) -> DistillSettings:
        for part, rate in self.learning_rates.model_dump().items():
            if rate is not None and not getattr(self.trainable, part):
                raise ValueError(f"learning_rates.{part} is {rate}, and trainable.{part} is false")
        return self


# --- params/evaluate.yaml ---------------------------------------------------------------------------------------------


class EvaluateSettings(Strict):
    split: Literal["val", "test"]
    batch_size: PositiveInt
    max_new_tokens: PositiveInt
    bootstrap_resamples: PositiveInt
    confidence: Annotated[float, Field(gt=0, lt=1)]
    seed: int
    baselines: list[Name] = Field(description="arms that every other arm's gain is stated against")
    examples: PositiveInt = Field(description="samples where arms disagree, shown in the report")


# --- params/study.yaml ------------------------------------------------------------------------------------------------


def _of_terms(weights: dict[str, float]) -> dict[str, float]:
    """Those above 0."""
    for name in weights:
        try:
            terms.known(name)
        except ValueError as error:
            raise _refused("value_error", (name,), {}, {"error": error}) from None
    if not any(weights.values()):
        raise ValueError("at least one weight must be above 0")
    return {name: weight for name, weight in weights.items() if weight}


Weights = Annotated[dict[str, NonNegative], AfterValidator(_of_terms)]  # L = sum of weight x L_term; a term not named: 0


class Arm(WithTerms):
    """One student of the study. `iva`, `tpa`, `divergence`, other terms' blocks: null means as in `params/distill.yaml`."""

    weights: Weights
    student: Name
    seed: int
    iva: Iva | None = None
    tpa: Tpa | None = None
    divergence: Divergence | None = None

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """Of the terms that weigh something, as their dataclasses take them. Of an arm that Settings.arm has filled in."""
        assert self.iva is not None and self.tpa is not None
        own: dict[str, dict[str, Any]] = {
            "iva": {"uniform": self.iva.weighting == "uniform", "divergence": _dumped(self.iva.divergence)},
            "tpa": {"divergence": _dumped(self.tpa.divergence)},
        }
        return {name: _tuples((own | self.blocks).get(name, {})) for name in self.weights}

    @property
    def needs(self) -> dict[str, terms.Needs]:
        """What each of them has the step compute."""
        return {name: terms.term_class(name)(**options).needs for name, options in self.options.items()}

    @property
    def needs_layer(self) -> bool:
        """Whether it weighs visual tokens by what the layer search finds."""
        assert self.iva is not None
        return self.iva.weighting in ("irs", "searched") and any(needs.attention for needs in self.needs.values())


def _dumped(divergence: Divergence | None) -> dict[str, Any] | None:
    return None if divergence is None else divergence.model_dump()


class StudySettings(Strict):
    arms: dict[ArmName, Arm] = Field(min_length=1)

    @model_validator(mode="after")
    def _not_the_teacher(self) -> StudySettings:
        if TEACHER_ARM in self.arms:
            raise ValueError(f"arms.{TEACHER_ARM}: the name is taken by the teacher's own scores")
        return self


# --- params/runtime.yaml ----------------------------------------------------------------------------------------------


class RuntimeSettings(Strict):
    """What does not change results; each field can be set by the environment as ALIGNTI_<FIELD>."""

    device: Literal["auto", "cpu", "cuda", "mps"]
    threads: PositiveInt = Field(strict=False, description="CPU threads of one process")
    workers: PositiveInt | None = Field(strict=False, description="processes that prepare data; null: one per core")
    loaders: Annotated[int, Field(ge=0)] = Field(strict=False, description="processes that load batches ahead; 0: none")
    devices: PositiveInt = Field(strict=False, description="processes of one training, one device each")
    accelerate: Name | None = Field(description="a file of params/accelerate/; null: ddp or ddp-cpu if devices > 1")
    teacher_device: Annotated[str, Field(pattern=r"^(same|cpu|cuda:\d+)$")] = Field(description="same: with the student")
    teacher_sharded: bool = Field(strict=False, description="the teacher's layers are shared out over the processes (FSDP2)")
    tracking_uri: str
    experiment: str


# --- all of them ------------------------------------------------------------------------------------------------------


class Settings(Strict):
    data: DataSettings
    models: ModelsSettings
    teacher: TeacherSettings
    irs: IrsSettings
    distill: DistillSettings
    evaluate: EvaluateSettings
    study: StudySettings
    runtime: RuntimeSettings

    def arm(self, name: str) -> Arm:
        """The arm with `null` blocks filled in from `params/distill.yaml`. Raises SettingsError if there is none."""
        if name not in self.study.arms:
            raise SettingsError(f"params/study.yaml has no arm {name!r}; it has {', '.join(self.study.arms)}")
        arm = self.study.arms[name]
        shared = {key: getattr(arm, key) or getattr(self.distill, key) for key in ("iva", "tpa", "divergence")}
        blocks = {term: block for term, block in (self.distill.blocks | arm.blocks).items() if term in arm.weights}
        own: dict[str, Any] = {field: getattr(arm, field) for field in ("weights", "student", "seed")}
        return Arm(**own | shared | blocks)

    @property
    def needs_layer(self) -> bool:
        """Whether some arm does."""
        return any(self.arm(name).needs_layer for name in self.study.arms)

    def uses_cache(self, arm: Arm) -> bool:
        """Whether the arm does without the live teacher. One with L_tpa does not: it compares tokens that the student draws."""
        return self.distill.teacher_signals.source == "cache" and not terms.union(arm.needs.values()).live_teacher


FILES = tuple(Settings.model_fields)


def load_settings(root: Path = Path()) -> Settings:
    """Read and check every file under `root/params`.

    Raises:
        SettingsError: naming every problem of every file by file, line and key.
    """
    raw, problems = {}, []
    for name in FILES:
        try:
            raw[name] = read_yaml(root / "params" / f"{name}.yaml")
        except SettingsError as error:
            problems.append(str(error))
    if not problems:
        raw["runtime"] = {**raw["runtime"], **_environment()}
        try:
            settings = Settings.model_validate(raw)
        except ValidationError as error:
            problems += [_describe(root, raw, problem) for problem in error.errors()]
        else:
            problems += _cross_checks(settings)
    if problems:
        raise SettingsError(f"{len(problems)} problem(s) in params/:\n  " + "\n  ".join(problems))
    return settings


class _BadKey(Exception):
    """`line: key: what is wrong`."""


class _Loader(QUICK):  # type: ignore[misc, valid-type]
    """Keys are text, and each stands once: YAML itself lets the last of two win, and takes `no` for false, `1` for a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            kind = key.tag.rpartition(":")[2]
            if kind == "str" and not key.style and _is_number(key.value):
                kind = "float"  # to YAML 1.2, as DVC reads it
            if kind not in ("str", "merge"):
                raise _BadKey(f'{line}: {key.value}: YAML takes it for a {kind}, not for text; write "{key.value}"')
            if key.value in lines:
                raise _BadKey(f"{line}: {key.value}: stands twice, here and in line {lines[key.value]}; leave one")
            lines[key.value] = line
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping. Raises SettingsError with file and line if it is missing, malformed or no mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise SettingsError(f"{path}: missing; `git checkout {path}` brings the shipped one back") from None
    except _BadKey as bad:
        raise SettingsError(f"{path}:{bad}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must be a mapping of keys to values")
    return content


def _environment() -> dict[str, str]:
    found = {field: os.environ.get(f"ALIGNTI_{field.upper()}") for field in RuntimeSettings.model_fields}
    return {field: value for field, value in found.items() if value}


def _cross_checks(settings: Settings) -> list[str]:
    """What no single file can know."""
    problems = []
    students = settings.models.members.students
    for name, arm in settings.study.arms.items():
        if arm.student not in students:
            problems.append(
                f"params/study.yaml: arms.{name}.student: {arm.student!r} is none of the students of params/models.yaml"
                f" ({', '.join(students)})"
            )
        problems += _cache_checks(settings, name)
    problems += _stage_checks(settings)
    tokens, longest = settings.distill.micro_batch_tokens, settings.models.max_length
    if tokens is not None and tokens < longest:
        problems.append(
            f"params/distill.yaml: micro_batch_tokens: {tokens} is less than one sample may have"
            f" (params/models.yaml: max_length {longest})"
        )
    for name in settings.evaluate.baselines:
        if name not in settings.study.arms:
            problems.append(f"params/evaluate.yaml: baselines: {name!r} is no arm of params/study.yaml")
    return problems


def _stage_checks(settings: Settings) -> list[str]:
    """What goes with captions and no teacher, and what with one."""
    align, teachers = settings.distill.stage == "align", settings.models.members.teachers
    if not align:
        empty = f"params/models.yaml: {settings.models.family}.teachers: {{}} is for `stage: align`; name a teacher"
        return [] if teachers else [empty]
    problems = []
    if settings.models.family == "embedded":
        problems.append(
            "params/distill.yaml: stage: align is for `family: pretrained`; embedded models learn captions as built"
        )
    elif teachers:
        problems.append(
            f"params/models.yaml: pretrained.teachers: stage align has none, and here are {', '.join(teachers)}; set it to {{}}"
        )
    if settings.distill.teacher_signals.source == "cache":
        problems.append("params/distill.yaml: teacher_signals.source is cache, and stage align has no teacher; set it to live")
    for name in settings.study.arms:
        if asking := [term for term, needs in settings.arm(name).needs.items() if needs.teacher]:
            problems.append(
                f"params/study.yaml: arms.{name}.weights: {', '.join(asking)} ask a teacher, and stage align has none; set all"
                " but sft to 0"
            )
    return problems


def _cache_checks(settings: Settings, name: str) -> list[str]:
    """What the cache of teacher signals, made once for all arms, cannot serve."""
    arm, shared = settings.arm(name), settings.distill
    assert arm.divergence is not None and arm.iva is not None  # filled in by Settings.arm
    if not settings.uses_cache(arm) or not terms.union(arm.needs.values()).teacher:
        return []
    problems = []
    if shared.teacher_weights != "same":
        problems.append(f"teacher_weights is {shared.teacher_weights}, and the cache is made with a teacher in `precision`")
    own = {term: options.get("divergence") for term, options in arm.options.items()}
    for term, divergence in {"": arm.divergence.model_dump(), **own}.items():
        where = f"{term}.divergence".lstrip(".")
        if divergence and divergence["kind"] != "forward":
            problems.append(f"{where}.kind is {divergence['kind']}, and the cache serves the forward divergence alone")
        if divergence and divergence["temperature"] != shared.divergence.temperature:
            problems.append(f"{where}.temperature differs from that of params/distill.yaml, which the cache is made with")
    kept = "irs" if shared.iva.weighting == "uniform" else shared.iva.weighting  # the cache holds some attention in any case
    asked = arm.iva.weighting, arm.iva.layer
    if any(needs.attention for needs in arm.needs.values()) and asked != (kept, shared.iva.layer):
        problems.append("iva differs from that of params/distill.yaml, which the cache is made with")
    return [f"params/study.yaml: arms.{name}: {problem}; or set teacher_signals.source to live" for problem in problems]


def _describe(root: Path, raw: dict[str, Any], problem: Any) -> str:
    """`file:line: key: message`, with the nearest known key for an unknown one."""
    file, *steps = problem["loc"]
    keys = [step for step in steps if step not in _MEMBERS]
    path = root / "params" / f"{file}.yaml"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _known_keys(steps[:-1], str(file))
        near = difflib.get_close_matches(str(keys[-1]), known, n=1)
        message = f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known: {', '.join(known)}"
    elif problem["type"] == "missing":
        message = "required, and missing"
    elif keys and not isinstance(problem["input"], dict):
        message += f", not {problem['input']!r}"
        if problem["type"] == "string_type" and problem["input"] is not None:
            message += "; YAML takes it for that unless it stands in quotes"
        if problem["type"] == "float_type" and _is_number(problem["input"]):
            message += f"; YAML takes that for text, write {float(problem['input'])!r}"
    key = ".".join(str(part) for part in keys)
    return f"params/{file}.yaml:{_line(path, keys)}: {key or '(file)'}: {message}"


def _is_number(text: Any) -> bool:
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False


def _known_keys(keys: list[Any], file: str) -> list[str]:
    """Field names of the model at `keys`, following dicts of models and optional models."""
    annotation: Any = Settings.model_fields[file].annotation
    for key in keys:
        model = _model_in(annotation)
        if key in _MEMBERS:
            annotation = _MEMBERS[key]
        elif get_origin(annotation) is dict or model is None:  # the user's own name
            annotation = get_args(annotation)[-1]
        elif key in model.model_fields:
            annotation = model.model_fields[str(key)].annotation
        else:  # a loss term's block
            return [field.name for field in dataclasses.fields(terms.term_class(str(key)))]
    model = _model_in(annotation)
    of_terms = terms.names() if model is not None and issubclass(model, WithTerms) else []
    return list(dict.fromkeys([*model.model_fields, *of_terms])) if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _line(path: Path, keys: list[Any]) -> int:
    """The line of the deepest of `keys` that the file has."""
    node = yaml.compose(path.read_text(encoding="utf-8"))
    line = 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            pairs = {k.value: (k, v) for k, v in node.value}
            if str(key) not in pairs:
                break
            name, node = pairs[str(key)]
            line = name.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line


def not_here(settings: Settings) -> list[str]:
    """What the user's own settings name and this folder lacks: data, images, local checkpoints; `key: path`."""
    return [f"{key}: {path}" for key, path in named_paths(settings) if not _is_here(path)]


def named_paths(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Key and path of the user's own data and local checkpoints."""
    data, models = settings.data, settings.models.members
    if data.source == "llava" and data.llava is not None:
        yield from (("data.llava.annotations", data.llava.annotations), ("data.llava.images", data.llava.images))
    if data.source == "mixture" and data.mixture is not None:
        for name, source in data.mixture.sources.items():
            if not source.files.startswith("hf://"):
                yield f"data.mixture.sources.{name}.files", Path(source.files)
            if source.images is not None:
                yield f"data.mixture.sources.{name}.images", source.images
        yield from (("data.mixture.evaluation_images", folder) for folder in data.mixture.evaluation_images)
    if isinstance(models, PretrainedFamily):
        for name, model in (*models.teachers.items(), *models.students.items()):
            parts = {"": model} if isinstance(model, Checkpoint) else {}
            if isinstance(model, Parts):
                parts = {".tower": model.tower, ".language_model": model.language_model}
            yield from ((f"models.pretrained: {name}{part}", Path(c.source)) for part, c in parts.items() if not c.revision)


def _is_here(path: Path) -> bool:
    """`x/*.tar` is, if one such file is."""
    return path.exists() or ("*" in path.name and any(path.parent.glob(path.name)))
