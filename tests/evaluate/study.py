"""What the stages before `compare` leave behind, made up: six arms and a teacher on questions about small pictures."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from components.config.loss_terms import Weights
from components.config.study import Arm
from components.dataset.shards import ImageRow, Turn
from components.evaluate.metrics import score
from components.io import write_bytes, write_text
from components.irs.overlays import AttentionExample, curve, overlay, peaks
from components.records.dataset import Manifest
from components.records.distill import Cost
from components.records.evaluate import Fingerprint, Likelihood, Prediction
from components.records.irs import LayerChoice
from components.records.paths import DATASET, IRS, REPORTS, SCORES, STUDENTS, TEACHER_ARM
from components.records.record import jsonl
from components.records.teacher import Candidate, TeacherReport
from components.report.figures import draw
from tests.layers import layer_choice as shared_layer_choice
from tests.shards import write_split
from tests.tried import keep_all

ARMS = {"sft": 0.62, "kd": 0.635, "kd_uniform": 0.70, "kd_iva": 0.715, "kd_tpa": 0.65, "align_ti": 0.72}  # share answered right
TEACHER = 0.88
KINDS = {
    "digit_at": ("What digit is at b2?", "seven"),
    "colour_at": ("What colour is the digit at c1?", "red"),
    "count": ("How many digits are there?", "five"),
    "count_colour": ("How many red digits are there?", "two"),
    "is_there": ("Is there a green three?", "yes"),
    "largest": ("What is the largest digit?", "nine"),
    "where": ("Where is the four?", "a3"),
    "list": ("List all blue digits.", "one, four"),
    "sum": ("What is the sum of the digits in row 1?", "11"),
}
MEASURED = Fingerprint(
    kit="alignti",
    kit_version="1",
    dataset="tests/test",
    dataset_hash="a" * 64,
    prompt_hash="b" * 64,
    decoding={"do_sample": False, "max_new_tokens": 8},
    judge="exact match",
    transformers="5.23.0",
    dtype="float32",
    device="cpu",
)
TERMS = {"sft": 0.9, "kd": 0.4, "iva": 0.2, "tpa": 0.7}


def write_study(
    root: Path,
    images: int = 60,
    per_image: int = 4,
    arms: dict[str, float] = ARMS,
    teacher: float = TEACHER,
    seed: int = 0,
    pictures: bool = True,
) -> None:
    """Everything that `compare` reads, under `root`; `pictures` of earlier stages are for the report alone."""
    rng = np.random.default_rng(seed)
    rows = [_row(index, per_image, rng) for index in range(images)]
    dataset = root / DATASET
    split = write_split(dataset / "test", rows, images_per_shard=50)
    Manifest(
        source="tests", rows_in=split.samples, rows_out=split.samples, quarantined=0, splits={"test": split}, digest="0" * 64
    ).write(dataset / "manifest.json")
    keep_all(dataset)
    write_bytes(dataset / "contact_sheet.png", _sheet(rows))
    difficulty = rng.normal(0, 0.12, images)
    for arm, rate in {TEACHER_ARM: teacher, **arms}.items():
        write_scores(root, arm, [p for row, d in zip(rows, difficulty, strict=True) for p in _answers(row, rate - d, arm, rng)])
    for index, arm in enumerate(arms):
        folder = root / STUDENTS / arm
        Cost(train_seconds=61.2 + 34 * index, peak_memory_mib=880 + 41 * index, device="cpu", steps=1200).write(
            folder / "cost.json"
        )
        write_text(folder / "losses.jsonl", jsonl(_losses(arm, rng)))
    if pictures:
        _teacher(root)
        _layers(root, rows[0])


def write_scores(root: Path, arm: str, predictions: list[Prediction], measured: Fingerprint | None = MEASURED) -> None:
    folder = root / SCORES / arm
    score(arm, predictions).model_copy(update={"fingerprint": measured}).write(folder / "scores.json")
    write_text(folder / "predictions.jsonl", jsonl(predictions))
    write_text(folder / "likelihoods.jsonl", jsonl(_likelihood(arm, p) for p in predictions))


def _likelihood(arm: str, prediction: Prediction) -> Likelihood:
    """What is answered wrong was unlikely, and further from the teacher."""
    tokens = len(prediction.reference.split()) + 1
    random = np.random.default_rng(zlib.crc32(f"{arm} {prediction.id}".encode()))
    nats = tokens * (0.1 if prediction.correct else 0.9) * random.lognormal(0, 0.3)
    kl = None if arm == TEACHER_ARM else 0.4 * nats
    return Likelihood(id=prediction.id, tokens=tokens, nats=nats, kl=kl)


def _row(index: int, per_image: int, rng: np.random.Generator) -> ImageRow:
    picture = Image.fromarray(rng.integers(0, 30, (64, 64, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(picture)
    for cell in rng.permutation(16)[:6]:
        x, y = 16 * (int(cell) % 4), 16 * (int(cell) // 4)
        pen.text((x + 5, y + 2), str(rng.integers(10)), fill=["#f44", "#4d4", "#59f", "#fd3"][rng.integers(4)])
    file = io.BytesIO()
    picture.save(file, "PNG")
    kinds = [list(KINDS)[(index * per_image + turn) % len(KINDS)] for turn in range(per_image)]
    samples = []
    for turn, kind in enumerate(kinds):
        question, reference = KINDS[kind]
        reference = ("yes", "no")[index % 2] if reference == "yes" else reference
        samples.append((f"image-{index}-{turn}", kind, (Turn(f"<image>\n{question}", reference),)))
    return ImageRow(f"image-{index}", file.getvalue(), tuple(samples))


def _answers(row: ImageRow, rate: float, arm: str, rng: np.random.Generator) -> list[Prediction]:
    predictions = []
    for id_, kind, turns in row.samples:
        reference = turns[0].answer
        hard = 0.15 if kind in ("where", "count_colour") else -0.03
        shared = np.random.default_rng(zlib.crc32(id_.encode())).random()  # arms err on the same questions, mostly
        right = 0.75 * shared + 0.25 * rng.random() < rate - hard
        wrong = {"yes": "no", "no": "yes"}.get(reference, "six" if reference != "six" else "two")
        predictions.append(
            Prediction(
                id=id_,
                image_id=row.image_id,
                kind=kind,
                question=turns[0].question,
                reference=reference,
                answer=reference if right else wrong,
                correct=bool(right),
            )
        )
    return predictions


def _losses(arm: str, rng: np.random.Generator) -> list[dict[str, float]]:
    terms = ["sft"] + [term for term in ("kd", "iva", "tpa") if term in arm or (term == "iva" and "uniform" in arm)]
    terms = list(TERMS) if arm == "align_ti" else terms
    rows = []
    for step in range(20, 1201, 20):
        fall = {t: TERMS[t] * (0.15 + 2.2 * np.exp(-step / 300)) * rng.lognormal(0, 0.05) if t in terms else 0.0 for t in TERMS}
        rows.append({"step": step, **fall, "total": sum(fall.values()), "lr": 0.002})
    return rows


def _teacher(root: Path) -> None:
    candidates = [
        Candidate(
            name=name,
            exact_match=exact,
            per_kind=dict.fromkeys(KINDS, exact),
            nats_per_token=0.2,
            irs=0.3,
            irs_layer=2,
            parameters=size,
            seconds_per_1000=4.2,
            memory_mib=310.0,
            refused=[],
        )
        for name, exact, size in (("small", 0.79, 512_345), ("base", 0.88, 1_204_880))
    ]
    reason = "base answers 88.0% of 400 validation questions right, more than small; it is within all limits."
    TeacherReport(chosen="base", reason=reason, candidates=candidates).write(root / "reports/teacher/candidates.json")
    write_bytes(root / "reports/teacher/quality_cost.png", draw(curve, layer_choice()))


def layer_choice() -> LayerChoice:
    errors = [0.002, 0.011, 0.012, 0.013]
    return shared_layer_choice(2, [0.012, 0.251, 0.284, 0.243], standard_error=errors, images=200, pairs=1200)


def _layers(root: Path, row: ImageRow) -> None:
    choice = layer_choice()
    choice.write(root / IRS / "layer.json")
    folder = root / REPORTS / "irs"
    write_bytes(folder / "curve.png", draw(curve, choice))
    write_text(folder / "curve.json", json.dumps([{"layer": i, "irs": irs} for i, irs in enumerate(choice.irs)]))
    rng = np.random.default_rng(1)
    weights = [rng.dirichlet(np.full(64, 0.15)).astype(np.float32) for _ in range(4)]
    gazes = [
        AttentionExample(q, a, *weights[2 * i : 2 * i + 2], region=None) for i, (q, a) in enumerate(list(KINDS.values())[:2])
    ]
    assert row.image is not None
    image = np.asarray(Image.open(io.BytesIO(row.image)))
    for index in (1, 2):
        write_bytes(folder / f"overlay_{index}.png", draw(overlay, image, gazes, peaks(gazes), f"layer {choice.layer}"))


def _sheet(rows: list[ImageRow]) -> bytes:
    sheet = Image.new("RGB", (640, 260), "white")
    for index, row in enumerate(rows[:8]):
        assert row.image is not None
        tile = Image.open(io.BytesIO(row.image)).resize((120, 120), Image.Resampling.NEAREST)
        sheet.paste(tile, (20 + 150 * (index % 4), 5 + 128 * (index // 4)))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def study_arms(names: Iterable[str] = ARMS) -> dict[str, Arm]:
    """Settings under which no two arms differ in their seed alone."""
    return {
        name: Arm(weights=Weights(sft=1.0, kd=float(index), iva=0.0, tpa=0.0), student="student", seed=1)
        for index, name in enumerate(names)
    }
