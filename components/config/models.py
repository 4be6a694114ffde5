"""Schema of params/models.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from components.config.fields import Beta, Name, NonNegative, PositiveFloat, PositiveInt, Ratio, Seed, Strict


class Optimiser(Strict):
    """AdamW with linear warm-up and cosine decay to zero."""

    learning_rate: PositiveFloat
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]  # YAML has lists, not tuples
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
    def _check_cell_size(self) -> TowerShape:
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
    """Tiny models that `obtain_models` builds and trains from scratch on the prepared data."""

    seed: Seed
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
    """LLaVA assembled from a vision tower, a new two-layer projector and a language model, as in the paper."""

    tower: Checkpoint = Field(description="SigLIP: its vision tower and image processor")
    language_model: Checkpoint = Field(description="Qwen2, Qwen2.5 or Qwen3")
    feature_layer: int = Field(description="the tower's layer that is read: -2 the last but one, as docs/method.md has it")
    seed: Seed = Field(description="of the projector's weights")


class Cut(Strict):
    """Student pruned from a teacher: some layers and MLP neurons of the language model removed, the rest copied."""

    teacher: Name = Field(description="one of `teachers`")
    every: PositiveInt = Field(description="of L layers keep 0, every, 2 every, ...; 1: all of them")
    mlp: PositiveInt | None = Field(description="neurons kept in each MLP, those of the largest weights; null: all of them")


def _by_keys(*kinds: type[Strict]) -> BeforeValidator:
    """Validator that selects the model of an entry by its keys (default: Checkpoint); keys of several models are an error."""

    def parse(entry: Any) -> Any:
        if isinstance(entry, Strict):
            return entry
        keys = entry if isinstance(entry, dict) else ()
        matches = {
            kind: fields for kind in (Checkpoint, Parts, Cut) if (fields := [key for key in keys if key in kind.model_fields])
        }
        if len(matches) > 1 or not matches.keys() <= set(kinds):
            conflict = " and ".join(f"{', '.join(fields)} ({kind.__name__.lower()})" for kind, fields in matches.items())
            forms = " or ".join(f"{{{', '.join(kind.model_fields)}}}" for kind in kinds)
            raise ValueError(f"has {conflict}; give {forms}")
        return next(iter(matches), Checkpoint).model_validate(entry)

    return BeforeValidator(parse)


TeacherEntry = Annotated[Checkpoint | Parts, _by_keys(Checkpoint, Parts)]
StudentEntry = Annotated[Checkpoint | Parts | Cut, _by_keys(Checkpoint, Parts, Cut)]


class PretrainedFamily(Strict):
    teachers: dict[Name, TeacherEntry] = Field(description="none for `stage: align`")
    students: dict[Name, StudentEntry]

    @model_validator(mode="after")
    def _check_cut_teachers(self) -> PretrainedFamily:
        for name, student in self.students.items():
            if isinstance(student, Cut) and student.teacher not in self.teachers:
                teachers = ", ".join(self.teachers) or "there are none"
                raise ValueError(f"students.{name}.teacher: {student.teacher!r} is none of the teachers ({teachers})")
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
    def _check_family_block(self) -> ModelsSettings:
        if getattr(self, self.family) is None:
            raise ValueError(f"family is {self.family}, so the block `{self.family}:` must be filled in")
        if not self.image_splitting and self.family == "embedded":
            raise ValueError("image_splitting: false is for `family: pretrained`; embedded models split no image")
        return self

    @property
    def members(self) -> EmbeddedFamily | PretrainedFamily:
        selected = self.embedded if self.family == "embedded" else self.pretrained
        assert selected is not None
        return selected
