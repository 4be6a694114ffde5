"""Schema of params/distill.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.config.fields import NonNegative, PositiveFloat, PositiveInt, Share, Strict
from components.config.loss_terms import Divergence, WithTerms
from components.config.models import Optimiser


class Iva(Strict):
    """Weights over visual tokens: attention (mean, all rows) at the IRS layer or at a given one; equal; what the rule of
    params/irs.yaml picks; what each adds to the teacher's log-probability of the answer; the row's own entropy of the teacher,
    or its KL."""

    weighting: Literal["irs", "searched", "layer", "uniform", "gradient", "entropy", "divergence"]
    layer: Annotated[int, Field(ge=0)] | Literal["middle", "last", "random"] | None = Field(
        description="for weighting: layer; middle, last, or random by the arm's seed: of the live teacher's"
    )
    change: Literal["permuted", "sinks_removed", "sinks_alone", "other_instruction", "other_image"] | None = Field(
        default=None, description="a control: the weights permuted within the image, a part of them, or another sample's"
    )
    rows: PositiveInt | None = Field(
        default=None, description="visual rows drawn per image, by their weights and without bias; null: all are read"
    )
    divergence: Divergence | None = Field(default=None, description="null: the arm's")

    @property
    def of_another(self) -> str | None:
        """Whose weights each sample is given, where not its own."""
        return self.change if self.change in ("other_instruction", "other_image") else None

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
    alternatives: Literal["shuffled", "wrong"] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="a control: each step with the alternatives of another of its answer, or without those that are right",
    )

    @model_validator(mode="after")
    def _others_than_gold(self) -> Tpa:
        if self.alternatives is not None and self.source == "gold":
            raise ValueError("`alternatives` are changed of a source other than gold")
        return self

    @model_validator(mode="after")
    def _enough_to_draw(self) -> Tpa:
        if not self.replacement and (self.top_p is not None or (self.top_k or self.draws) < self.draws):
            raise ValueError("drawing without replacement needs `top_k` of at least `draws`, or none, and no `top_p`")
        return self


class Evidence(Strict):
    """What each answer of the teacher rests on, for arms with L_mcd."""

    kinds: list[Literal["gradient", "random"]] = Field(min_length=1)
    share: Share = Field(description="of a sample's words and visual tokens, at most")


class TeacherSignals(Strict):
    """Source of the teacher's logits for KD and IVA: a live forward pass, or the cache that `cache_teacher` makes."""

    source: Literal["live", "cache"]
    kind: Literal["top_k", "sampled"] = Field(description="what the cache keeps per row: likeliest tokens, or draws")
    top_k: PositiveInt = Field(description="for kind: top_k, how many, with the mass of all others")
    draws: Annotated[int, Field(ge=1, le=255)] = Field(description="for kind: sampled, of the teacher's distribution")
    evidence: Evidence | None = Field(description="kept beside, whatever the source; null: none")


class TeacherAnswers(Strict):
    """Answers that the teacher writes to the first questions of the train split, for arms with `answers: teacher`."""

    samples: PositiveInt = Field(description="answers to each; an epoch takes one after another")
    temperature: NonNegative = Field(description="that tokens are drawn at; 0: greedy")
    top_p: Share | None = Field(description="draw among the fewest tokens whose probabilities reach this; null: among all")
    max_new_tokens: PositiveInt = Field(description="an answer that has not ended by then is not kept")

    @model_validator(mode="after")
    def _one_if_greedy(self) -> TeacherAnswers:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("greedy answers are all the same: set samples to 1, or a temperature")
        return self


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
    teacher_answers: TeacherAnswers | None = Field(description="null: the teacher writes none")
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
    def _a_layer_to_keep(self) -> DistillSettings:
        if self.teacher_signals.source == "cache" and isinstance(self.iva.layer, str):
            raise ValueError(f"iva.layer is {self.iva.layer}, which a live teacher's depth says: give the cache its number")
        if self.teacher_signals.source == "cache" and self.iva.weighting == "gradient":
            raise ValueError("iva.weighting is gradient, which takes a live teacher: set teacher_signals.source to live")
        return self

    @model_validator(mode="after")
    def _rates_of_what_is_trained(self) -> DistillSettings:
        for part, rate in self.learning_rates.model_dump().items():
            if rate is not None and not getattr(self.trainable, part):
                raise ValueError(f"learning_rates.{part} is {rate}, and trainable.{part} is false")
        return self
