"""Records of stage `cache_teacher`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from components.records.irs import Rows
from components.records.record import Record


class SignalFacts(Record):
    """Identity of the teacher's signals: a run uses a cache only if all fields are equal."""

    teacher: str  # sha256 of its folder
    students: dict[str, str]  # student -> sha256 of its folder, checked for the teacher's vocabulary and images
    dataset: str  # digest
    split: str  # sha256 of the train split's rows after `check_rows`
    template: str  # sha256
    precision: Literal["fp32", "bf16"]  # dtype of the teacher's weights
    layer: int  # layer of the attention map behind the visual weights
    rows: Rows
    background: str | None  # digest of the background, for centred attention
    temperature: float
    kind: Literal["top_k", "sampled"]
    top_k: int
    draws: int
    evidence: dict[str, Any] | None = Field(default=None, exclude_if=lambda value: value is None)  # as asked


class Approximation(Record):
    """Error of the cached KL, |KL from the cache - exact KL|, over some rows, against a student before distillation."""

    student: str
    rows: int
    kl: float  # mean exact KL, nats
    mean_error: float  # nats
    max_error: float  # nats
    relative_error: float  # mean error / mean KL
    bias: float  # mean signed error, nats
    mean_mass_beyond: float  # teacher's mass outside the top k; 0 for sampled tokens, which cover the vocabulary
    max_mass_beyond: float


class SignalCache(Record):
    facts: SignalFacts
    shared_vocabulary: int
    dtype: Literal["float16", "float32"]  # dtype of the log-probabilities or entropies
    samples: int
    rows: int
    equal_weights: int  # samples with uniform visual weights, for lack of attention
    size_bytes: int
    shards: dict[str, str]  # file -> sha256
    errors: dict[Literal["text", "visual"], Approximation]  # without kinds that have no rows


class EvidenceKept(Record):
    """Teacher's evidence, of kinds `gradient` and `random` for L_mcd, `blurred` and `blank` for L_va_kd."""

    facts: SignalFacts
    asked: int  # samples with an image and a partner, for L_mcd
    right: dict[str, int]  # kind -> kept samples: which the teacher answers correctly; for L_va_kd all with an image
    effect: dict[str, float]  # kind -> mean effect; for L_va_kd mean image dependence of a sample's tokens; nats
    shards: dict[str, dict[str, str]]  # kind -> file -> sha256


class SignalManifest(Record):
    """artifacts/signals/manifest.json; `cache` is null if params/distill.yaml selects the live teacher."""

    cache: SignalCache | None
    evidence: EvidenceKept | None = Field(default=None, exclude_if=lambda value: value is None)
