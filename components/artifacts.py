"""Typed records that stages hand each other, and where they lie.

Every path is relative to the repository root, which is every stage's working directory. Records are JSON, written
atomically (a reader sees the old file or the new one, never half of one).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.errors import DataError, TryAgainError

RAW = Path("data")
DATASET = Path("artifacts/dataset")
MODELS = Path("artifacts/models")
ROWS = Path("artifacts/rows")
TEACHER = Path("artifacts/teacher")
IRS = Path("artifacts/irs")
SIGNALS = Path("artifacts/signals")
TERMS = Path("artifacts/terms")
STUDENTS = Path("artifacts/students")
SCORES = Path("artifacts/scores")
REPORTS = Path("reports")
RUNS = Path(".runs")  # checkpoints, journals, run records: neither git's nor DVC's

TEACHER_ARM = "teacher"  # the name under which the teacher's own scores stand beside the arms'

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Record(BaseModel):
    """Base of all records: strict, immutable, one JSON file each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def write(self, path: Path) -> Path:
        write_text(path, self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises DataError if the file is missing or not such a record."""
        try:
            text = path.read_text(encoding="utf-8")
            return cls.model_validate_json(text)
        except FileNotFoundError:
            raise DataError(f"{path} is missing; `dvc repro` makes it") from None
        except ValidationError as error:
            if reason := Absent.reason_in(text):
                raise DataError(f"{path} holds no {cls.__name__}: {reason}") from None
            raise DataError(f"{path} is no {cls.__name__}: {error.errors()[0]['msg']}; `dvc repro` makes it anew") from None


class Absent(Record):
    """In place of a record that a run does without."""

    none: str  # why

    @classmethod
    def reason_at(cls, path: Path) -> str | None:
        """None if there is no file, or another record in it."""
        return cls.reason_in(path.read_text(encoding="utf-8")) if path.exists() else None

    @classmethod
    def reason_in(cls, text: str) -> str | None:
        """None if the text is another record's."""
        try:
            return cls.model_validate_json(text).none
        except ValidationError:
            return None


NO_TEACHER = Absent(none="params/distill.yaml:stage is align, which has no teacher")


class ShardRecord(Record):
    file: str
    images: int
    samples: int
    sha256: str


class SplitRecord(Record):
    images: int
    samples: int
    kinds: dict[str, int]  # samples per question kind
    shards: list[ShardRecord]


class Manifest(Record):
    """artifacts/dataset/manifest.json"""

    source: str
    rows_in: int
    rows_out: int
    quarantined: int
    splits: dict[Split, SplitRecord]
    digest: str  # sha256 over the shards' hashes: the data set's identity


class SourceRecord(Record):
    """One source of a mixture; ids of its samples and images begin with its name and a slash."""

    weight: float  # times that each of its samples stands in an epoch of training, on average
    licence: str
    files: str
    rows: int


class Sources(Record):
    """artifacts/dataset/sources.json, where the data set is a mixture"""

    sources: dict[str, SourceRecord]


class Likeness(Record):
    """A training image that looks like one that is evaluated on."""

    train: str
    other: str
    where: str  # val, test, or a folder of evaluation images
    bits: int  # in which their looks differ
    verbatim: int  # of its conversations that are the other's too, word for word


class Overlap(Record):
    """artifacts/dataset/overlap.json: training images that look like evaluated ones (components/dataset/perceptual_hash.py)."""

    compared: dict[str, int]  # images per split and folder
    near: int  # training images
    verbatim: int  # conversations
    dropped: bool
    pairs: list[Likeness]  # the likest, at most 50


class ModelRecord(Record):
    """One usable checkpoint folder."""

    name: str
    role: Literal["teacher", "student"]
    path: str
    origin: str  # "embedded", a hub id, a local folder, two of those, or the teacher that it was cut from
    revision: str | None
    parameters: int
    size_bytes: int
    sha256: str  # over the folder's files
    visual_tokens: int | None  # per image; None where it depends on the image's shape


class ModelIndex(Record):
    """artifacts/models/index.json"""

    teachers: dict[str, ModelRecord]
    students: dict[str, ModelRecord]


class TriedSplit(Record):
    samples: int  # of the data set
    usable: int
    cut: int  # of the usable: to the turns that fit
    resized: int  # of the usable: their images are
    left_out: dict[str, int]  # reason -> samples
    tokens: int  # of the usable; the most that any model reads
    response_tokens: int  # of them, those that are trained on
    longest: int


class TriedRows(Record):
    """artifacts/rows/rows.json: what came of trying every row with the models' tokenizers, templates and image sizes."""

    digest: str  # the data set's
    max_length: int
    tried_with: list[str]  # models, one of those that read rows alike
    splits: dict[Split, TriedSplit]


class Candidate(Record):
    name: str
    exact_match: float
    per_kind: dict[str, float]
    nats_per_token: float  # mean cross-entropy on the reference answers
    irs: float | None  # of its best layer; None: no image has enough instructions, and no arm asks
    irs_layer: int | None
    parameters: int
    seconds_per_1000: float
    memory_mib: float
    refused: list[str]  # limits of params/teacher.yaml that it breaks


class TeacherChoice(Record):
    """artifacts/teacher/choice.json: what later stages depend on, so nothing here varies from run to run."""

    name: str
    path: str
    sha256: str


class TeacherReport(Record):
    """reports/teacher/candidates.json"""

    chosen: str
    reason: str
    candidates: list[Candidate]


Attention = Literal["mean", "centred"]  # over heads and rows, as it is | less what the layer attends to whatever is asked
Rows = Literal["all", "words"]  # of the instruction | of it the question's own, without the template's
Interval = tuple[float, float]


class Picked(Record):
    """What weighs the visual tokens where params/distill.yaml asks for `weighting: searched`."""

    rule: Literal["irs", "pointing", "given"]  # of params/irs.yaml
    layer: int
    weighting: Attention
    rows: Rows
    runner_up: tuple[int, Attention, Rows] | None  # under `pointing`: the second best layer, weighting, rows
    separated: bool  # the lead over it is more than 1.96 standard errors of their paired difference

    @property
    def described(self) -> str:
        rows = "all instruction rows" if self.rows == "all" else "the question's words"
        return f"layer {self.layer}, {self.weighting} attention over {rows}"


class View(Record):
    """Per layer, for one weighting and kind of rows."""

    weighting: Attention
    rows: Rows
    irs: list[float]
    irs_standard_error: list[float]  # over images
    pointing: list[float]  # share of the weights on the asked region; empty where no region is known
    pointing_ci95: list[Interval]  # over images
    equal: list[int]  # instructions without any attention left, whose image's tokens weigh the same


class Region(Record):
    """The asked regions that `pointing` was measured on."""

    images: int
    questions: int
    equal: float  # share of equal weights on the region
    equal_ci95: Interval


class Background(Record):
    """Per layer, where the attention goes whatever is asked: its mean over images and instructions."""

    rows: Rows
    most: list[float]  # share of the one position that takes most
    sinks: list[list[int]]  # positions that take more than 5 times an equal share
    on_sinks: list[float]  # share of them together


class LayerChoice(Record):
    """artifacts/irs/layer.json: the layer of the highest IRS (mean attention over all rows, as in the paper), and what the rule
    of params/irs.yaml picks."""

    layer: int
    irs: list[float]  # per layer
    standard_error: list[float]  # per layer, over images
    separated: bool  # is the winner's lead over the runner-up more than 1.96 standard errors of their paired difference?
    runner_up: int
    images: int
    pairs: int
    picked: Picked
    views: list[View]
    region: Region | None  # None: no question's region is known, or not where the visual tokens lie
    grids: list[str]  # of visual tokens, that the images have
    backgrounds: list[Background]  # none where the grids differ

    @classmethod
    def found(cls) -> Self | None:
        """That of this folder; None where no layer could be searched for: no image has enough instructions."""
        return None if Absent.reason_at(IRS / "layer.json") else cls.read(IRS / "layer.json")


class SignalFacts(Record):
    """What decides the teacher's signals: a cache serves a run only if each of these is the same for both."""

    teacher: str  # sha256 of its folder
    students: dict[str, str]  # sha256 of each folder whose vocabulary and images were compared with the teacher's
    dataset: str  # digest
    template: str  # sha256
    precision: Literal["fp32", "bf16"]  # of the teacher's weights
    layer: int  # whose attention weighs the visual tokens
    rows: Rows
    background: str | None  # its digest, for centred attention
    temperature: float
    top_k: int


class Approximation(Record):
    """|KL from the cache - KL from the whole distribution| over sampled rows, against a student before distillation."""

    student: str
    rows: int
    kl: float  # mean of the exact one, nats
    mean_error: float  # nats
    max_error: float  # nats
    relative_error: float  # mean error / mean KL
    mean_mass_beyond: float  # of the teacher's probability, outside the k tokens
    max_mass_beyond: float


class SignalCache(Record):
    facts: SignalFacts
    shared_vocabulary: int
    dtype: Literal["float16", "float32"]  # of the log-probabilities
    samples: int
    rows: int
    equal_weights: int  # samples whose image's tokens weigh the same, for want of attention
    size_bytes: int
    shards: dict[str, str]  # file -> sha256
    errors: dict[Literal["text", "visual"], Approximation]  # none of a kind of which there are no rows


class SignalManifest(Record):
    """artifacts/signals/manifest.json; `cache` is null where params/distill.yaml asks for the live teacher."""

    cache: SignalCache | None


class Cost(Record):
    """artifacts/students/ARM/cost.json: varies from run to run, so only `compare` depends on it."""

    train_seconds: float
    peak_memory_mib: float
    device: str
    steps: int


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
    """How a score was measured. Two scores are compared only if theirs agree (components/evaluate/fingerprint.py)."""

    kit: str  # "alignti", "vlmeval", "lm-eval"
    kit_version: str  # a version, a commit, or a digest of the kit's code
    dataset: str  # its name, and the split
    dataset_hash: str  # of what was asked: images, questions, references
    prompt_hash: str  # of every prompt as the model read it, in order
    decoding: dict[str, bool | int | float | str]  # how answers were generated
    judge: str  # what decided that an answer is right
    transformers: str  # version
    dtype: str  # of the weights
    device: str  # its kind: "cpu", "cuda", "mps"


class Scores(Record):
    """artifacts/scores/ARM/scores.json"""

    arm: str
    samples: int
    exact_match: float  # over all samples
    per_kind: dict[str, float]
    yes_no: dict[str, YesNo]
    token_f1: float  # mean over samples
    token_f1_per_kind: dict[str, float]
    nats_per_token: float | None = None  # of the references; None: not measured
    kl_per_token: float | None = None  # from the teacher; None: not measured, or the teacher itself
    fingerprint: Fingerprint | None = None  # None: not known how it was measured, so it compares with nothing


class Difference(Record):
    """A measure of `arm` minus that of `against`, over the same samples; `p_holm` is adjusted for all pairs of arms."""

    arm: str
    against: str
    difference: float
    ci95: tuple[float, float]
    p_value: float
    p_holm: float
    p_mcnemar: float | None = None  # exact, over the yes/no questions alone; None if there are none
    differs: list[str] = []  # what their fingerprints do not share: then the difference is not of the arms alone

    @property
    def larger_than_noise(self) -> bool:
        """Whether the interval excludes zero and both were measured alike."""
        return not self.differs and not self.ci95[0] <= 0 <= self.ci95[1]


class Contrast(Record):
    """All pairs of arms by one measure, and what the sample can tell apart by it. Medians are over pairs; None for one arm."""

    pairs: list[Difference]  # each arm against each that ranks below it by exact match
    noise: float | None  # gap between two arms that this sample, and these seeds, tell apart
    detectable: float | None  # true gap that would be told apart four times in five
    spread: float | None  # standard deviation between runs that differ in their seed alone; None: one run per arm

    def gain(self, arm: str, baseline: str) -> Difference | None:
        """`arm` minus `baseline`, whichever of the two ranks higher; None if they are no pair."""
        pair = next((p for p in self.pairs if {p.arm, p.against} == {arm, baseline}), None)
        if pair is None or pair.arm == arm:
            return pair
        low, high = pair.ci95
        turned = {"arm": arm, "against": baseline, "difference": 0.0 - pair.difference, "ci95": (0.0 - high, 0.0 - low)}
        return pair.model_copy(update=turned)


class Estimate(Record):
    value: float
    ci95: tuple[float, float]
    per_kind: dict[str, float]


class TeacherResult(Record):
    """Exact match with its interval, over all samples and as the mean over kinds; the other measures over all samples."""

    exact_match: float
    ci95: tuple[float, float]
    average: float  # mean over kinds, each counting the same
    average_ci95: tuple[float, float]
    per_kind: dict[str, float]
    per_kind_ci95: dict[str, tuple[float, float]]
    yes_no: dict[str, YesNo]
    measures: dict[str, Estimate]  # token F1, nats and KL per token (components/evaluate/measures.py)
    differs: list[str] = []  # in how it was measured, from the teacher; then it compares with nothing here


class ArmResult(TeacherResult):
    """Means over the arm's runs, which differ in their seed alone; intervals of those means."""

    runs: dict[str, float]  # name in params/study.yaml -> exact match; the first gives the arm its name
    share_of_teacher: float | None  # exact match over the teacher's; None where the teacher has none
    share_ci95: tuple[float, float] | None
    gains: dict[str, Difference]  # over each baseline of params/evaluate.yaml
    train_seconds: float  # mean over runs
    peak_memory_mib: float  # the most of any run
    device: str
    steps: int


class PublishedRuns(Record):
    """Runs of a shipped recipe on the publisher's machine (components/evaluate/published_runs.yaml)."""

    recipe: str
    differing: int  # values of params/ that differ from the recipe's
    machine: str
    scores: dict[str, Annotated[list[float], Field(min_length=1)]]  # teacher and arms -> exact match, one number per seed


class Comparison(Record):
    """reports/compare.json"""

    headline: str  # what the sample can tell apart, and what may be said of the best arm
    standing: str  # the order of all arms with their intervals, in a sentence
    split: Split
    n: int  # samples
    images: int
    kinds: dict[str, int]  # samples per kind
    confidence: float  # of every interval here; 0.95 unless params/evaluate.yaml says otherwise
    resamples: int
    method: str
    teacher: TeacherResult
    arms: dict[str, ArmResult]  # in the order of params/study.yaml
    order: list[str]  # arms from the best down
    exact_match: Contrast
    measures: dict[str, Contrast]
    published: PublishedRuns | None = None  # of the recipe that params/ are nearest to

    @property
    def pairs(self) -> list[Difference]:
        """Each better arm against each that ranks below it, by exact match."""
        return self.exact_match.pairs

    @property
    def repeated(self) -> bool:
        """Whether some arm was trained with several seeds, so that intervals hold the seeds' share."""
        return self.exact_match.spread is not None


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write through a temporary neighbour and a rename, so that a crash leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft beside `folder` that takes its name, and the place of what had it, when the block ends well; else it is removed.

    Drafts of it that killed processes left are removed too: each may be as large as a model.

    Raises TryAgainError if the disk is full, of which safetensors, being Rust, tells in its own way.
    """
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    before = draft.with_suffix(".old")
    for left in folder.parent.glob(f".{folder.name}.*.*"):
        pid = left.name.removeprefix(f".{folder.name}.").partition(".")[0]
        if left.suffix in (".tmp", ".old") and pid.isdigit() and (int(pid) == os.getpid() or not _lives(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if folder.exists():
            folder.replace(before)
        draft.replace(folder)
    except Exception as error:
        if "os error 28" in str(error) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            raise TryAgainError(f"the disk is full, so {folder} was not written; free space and run again") from None
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def sha256(paths: Iterable[Path]) -> str:
    """One digest over the names and contents of files, folders walked in sorted order."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def fingerprint(facts: dict[str, Any], code: Iterable[str | Path]) -> str:
    """16 hex digits over what decides a result: settings, inputs, and code: rooms, or files. Equal means resumable."""
    here = Path(__file__).parent
    files = (file for each in code for file in ([each] if isinstance(each, Path) else (here / each).glob("*.py")))
    digest = sha256(sorted(files))
    text = json.dumps({"code": digest, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def jsonl(records: Iterable[Record | dict[str, Any]]) -> str:
    """Records as JSON lines."""
    lines = (r.model_dump_json() if isinstance(r, Record) else json.dumps(r, ensure_ascii=False) for r in records)
    return "".join(line + "\n" for line in lines)
