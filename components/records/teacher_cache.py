"""Records of stage `cache_teacher`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from components.records.irs import Rows
from components.records.record import Record


class SignalFacts(Record):
    """Identity of the teacher's signals: a cache serves a run only if each of these is the same for both."""

    teacher: str  # sha256 of its folder
    students: dict[str, str]  # sha256 of each folder whose vocabulary and images were compared with the teacher's
    dataset: str  # digest
    template: str  # sha256
    precision: Literal["fp32", "bf16"]  # dtype of the teacher's weights
    layer: int  # layer whose attention weighs the visual tokens
    rows: Rows
    background: str | None  # its digest, for centred attention
    temperature: float
    kind: Literal["top_k", "sampled"]
    top_k: int
    draws: int
    evidence: dict[str, Any] | None = Field(default=None, exclude_if=lambda value: value is None)  # as asked, and of which rows


class Approximation(Record):
    """|KL from the cache - KL from the whole distribution| over some rows, against a student before distillation."""

    student: str
    rows: int
    kl: float  # mean of the exact one, nats
    mean_error: float  # nats
    max_error: float  # nats
    relative_error: float  # mean error / mean KL
    bias: float  # mean of the error with its sign, nats
    mean_mass_beyond: float  # teacher's probability outside the k tokens; 0 where tokens are drawn, as none is out of reach
    max_mass_beyond: float


class SignalCache(Record):
    facts: SignalFacts
    shared_vocabulary: int
    dtype: Literal["float16", "float32"]  # dtype of the log-probabilities or entropies
    samples: int
    rows: int
    equal_weights: int  # samples whose image's tokens weigh the same, for want of attention
    size_bytes: int
    shards: dict[str, str]  # file -> sha256
    errors: dict[Literal["text", "visual"], Approximation]  # none of a kind of which there are no rows


class EvidenceKept(Record):
    """The teacher's part of L_mcd."""

    facts: SignalFacts
    asked: int  # samples with an image and a partner
    right: dict[str, int]  # kind -> samples kept: those that the teacher answers as the data do
    effect: dict[str, float]  # kind -> its mean, nats
    shards: dict[str, dict[str, str]]  # kind -> file -> sha256


class SignalManifest(Record):
    """artifacts/signals/manifest.json; `cache` is null where params/distill.yaml asks for the live teacher."""

    cache: SignalCache | None
    evidence: EvidenceKept | None = Field(default=None, exclude_if=lambda value: value is None)
