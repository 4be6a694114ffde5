"""Records of stage `evaluate`."""

from __future__ import annotations

from pydantic import Field

from components.records.record import Record


class Prediction(Record):
    """One line of artifacts/scores/ARM/predictions.jsonl"""

    id: str
    image_id: str
    kind: str
    question: str
    reference: str
    answer: str
    correct: bool


class Likelihood(Record):
    """One line of artifacts/scores/ARM/likelihoods.jsonl: sums over the tokens of the reference, its EOS included."""

    id: str
    tokens: int
    nats: float  # negative log-likelihood of the reference, teacher-forced
    kl: float | None  # KL(teacher || model); None for the teacher


class YesNo(Record):
    """POPE-style figures, "yes" being the positive class; one per yes/no kind and one over all of them."""

    samples: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


class Fingerprint(Record):
    """Measurement conditions of a score. Two scores are compared only if theirs agree (components/evaluate/fingerprint.py)."""

    kit: str  # "alignti", "vlmeval", "lm-eval"
    kit_version: str  # a version, a commit, or a digest of the kit's code
    dataset: str  # name and split
    dataset_hash: str  # hash of images, questions and references
    prompt_hash: str  # hash of all rendered prompts, in order
    decoding: dict[str, bool | int | float | str]  # generation settings
    judge: str  # name of the rule or model that judged answers
    transformers: str  # version
    dtype: str  # dtype of the weights
    device: str  # device kind: "cpu", "cuda", "mps"


class Scores(Record):
    """artifacts/scores/ARM/scores.json"""

    arm: str
    samples: int
    exact_match: float  # over all samples
    per_kind: dict[str, float]
    yes_no: dict[str, YesNo]  # by kind
    yes_no_overall: YesNo | None = None  # over all yes/no kinds; None without any
    token_f1: float  # mean over samples
    token_f1_per_kind: dict[str, float]
    nats_per_token: float | None = None  # mean NLL of the references; None: not measured
    kl_per_token: float | None = None  # KL from the teacher; None: not measured, or the teacher itself
    scorers: dict[str, float] = Field(default_factory=dict, exclude_if=lambda value: not value)  # of params/evaluate.yaml
    fingerprint: Fingerprint | None = None  # None: unknown, so the score is not comparable
