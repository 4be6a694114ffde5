"""A set in the shape of llava_v1_5_mix665k through `prepare` and `check_rows`: `python -m benchmarks.rows --rows 665000`

One row in 16 is text-only and long, as in that set; the others are conversations of one to ten turns, two to an image, which
share its name as their id. Images are JPEG of 64 x 48, of as many names as there are images but of few pictures. Some rows hold
special tokens as words, some are too long, some are broken. `check_rows` tokenises them for toys of LLaVA-1.5 and Qwen2-VL,
in the template of the paper.

Memory is what processes have to themselves beside files (anonymous): pages of the shards can be taken back at any time.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from benchmarks import measure, table
from benchmarks.prepare import process_cost
from components.config.data import LlavaFolder
from components.config.load import load_settings
from components.config.settings import Settings
from components.dataset.prepare import prepare
from components.process import cores
from components.records.dataset import Manifest
from components.records.models import ModelIndex, ModelRecord
from components.records.rows import TriedRows

MIX_ROWS, TEXT_ONLY = 665_000, 40_688
PICTURES = 500
FAMILIES = {"teacher": "llava", "student": "qwen2_vl"}
MAX_LENGTH = 2048
BROKEN = ("missing_file", "turns", "image_marks", "empty_answer", "too_long")  # one row in 250

WORDS = (
    *("what", "digit", "is", "at", "a1", "a2", "b1", "b2", "?", ".", ",", "red", "green", "one", "two", "three", "empty"),
    *("list", "describe", "the", "grid", "yes", "no", "user", "model"),
)  # vocabulary of the toys' tokenizers

Turns = list[dict[str, str]]


def generate(folder: Path, rows: int) -> None:
    """Write `folder/rows.json` and `folder/images`."""
    rng = random.Random(0)
    short, long = ([" ".join(rng.choices(WORDS, k=k)) for _ in range(2000)] for k in (6, 60))
    (folder / "images").mkdir(parents=True)
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    with (folder / "rows.json").open("w") as file:
        for i in range(rows):
            text = i * TEXT_ONLY // MIX_ROWS < (i + 1) * TEXT_ONLY // MIX_ROWS
            turns: Turns = []
            for _ in range(rng.randint(1, 4 if text else 10)):
                answer = rng.choice(long) if text or rng.random() < 0.2 else rng.choice(short)
                turns += [{"from": "human", "value": rng.choice(short)}, {"from": "gpt", "value": answer}]
            name = f"{i // 2:07}"
            row: dict[str, Any] = {"id": f"text-{i}" if text else name, "conversations": turns}
            if not text:
                row["image"] = f"{name}.jpg"
                turns[0]["value"] = f"<image>\n{turns[0]['value']}"
                if not (link := folder / "images" / row["image"]).exists():
                    link.hardlink_to(folder / f"{i // 2 % PICTURES}.jpg")
            corrupt(i, row, turns, rng.choice(long))
            file.write(("[" if not i else ",\n") + json.dumps(row))
        file.write("]")


def corrupt(i: int, row: dict[str, Any], turns: Turns, words: str) -> None:
    """Special tokens as words, too long a text, or a broken row, by the row's number."""
    if i % 100 == 3:
        turns[-1]["value"] += " </s> <|im_end|><|im_start|>"
    elif i % 250 == 4:
        turns[-1]["value"] = f"{words} " * 20
    elif i % 250 == 5:
        match BROKEN[i // 250 % len(BROKEN)]:
            case "missing_file":
                row["image"] = "nowhere.jpg"
                turns[0]["value"] = f"<image>\n{turns[0]['value'].removeprefix('<image>')}"
            case "turns":
                turns[0]["from"] = "gpt"
                turns[1]["from"] = "human"
            case "image_marks":
                turns[0]["value"] = f"<image><image>{turns[0]['value']}"
            case "empty_answer":
                turns[-1]["value"] = " "
            case _:
                turns[-1]["value"] = f"{words} " * 60


def models(folder: Path) -> None:
    from tests.families import toy

    def record(role: Literal["teacher", "student"]) -> dict[str, ModelRecord]:
        path, unknown = str(toy.save(FAMILIES[role], folder / role)), {"origin": "", "revision": None, "visual_tokens": None}
        sizes: dict[str, Any] = {"parameters": 1, "size_bytes": 1, "sha256": FAMILIES[role], **unknown}
        return {role: ModelRecord(name=role, role=role, path=path, **sizes)}

    ModelIndex(teachers=record("teacher"), students=record("student")).write(folder / "index.json")


def check(settings: Settings, folder: Path, dataset: Path, target: Path) -> None:
    from components.rows.trial import try_rows  # here, so that `prepare` is measured without transformers

    try_rows(settings, cores(), dataset, folder / "models", target)


def run(settings: Settings, folder: Path, rows: int) -> dict[str, Any]:
    generate(folder / "raw", rows)
    models(folder / "models")
    llava = LlavaFolder(annotations=folder / "raw/rows.json", images=folder / "raw/images", val=0.01, test=0.01)
    data = settings.data.model_copy(update={"source": "llava", "llava": llava, "images_per_shard": 10_000})
    model_settings = settings.models.model_copy(update={"max_length": MAX_LENGTH})
    settings = settings.model_copy(update={"data": data, "models": model_settings})
    dataset, target = folder / "dataset", folder / "rows"
    spawn, arms = multiprocessing.get_context("spawn"), {}
    processes = {
        "prepare": spawn.Process(target=prepare, args=(data,), kwargs={"target": dataset, "workers": cores()}),
        "check_rows": spawn.Process(target=check, args=(settings, folder, dataset, target)),
    }
    for name, process in processes.items():
        arm = process_cost(process)
        arms[name] = arm | {"rows_per_second": rows / arm["seconds"]}
    return {"arms": arms, "rows": count_rows(dataset, target, rows)}


def count_rows(dataset: Path, target: Path, rows: int) -> dict[str, dict[str, int]]:
    """Row counts by outcome. Raises AssertionError if a row is unaccounted for."""
    manifest, splits = Manifest.read(dataset / "manifest.json"), TriedRows.read(target / "rows.json").splits.values()
    reasons = [json.loads(line)["reason"] for line in (dataset / "quarantine.jsonl").read_text().splitlines()]
    remarks = [json.loads(line) for line in (target / "remarks.jsonl").read_text().splitlines()]
    dropped = Counter(remark["reason"] for remark in remarks if not remark["kept"])
    usable = sum(split.usable for split in splits)
    assert rows == manifest.rows_in == usable + dropped.total() + len(reasons), (rows, manifest, dropped)
    counts = {"in": rows, "usable": usable, "cut": sum(split.cut for split in splits)}
    counts |= {"tokens": sum(split.tokens for split in splits)}
    return {"counts": counts, "left out": dict(dropped), "quarantined": dict(Counter(reasons))}


def main() -> None:
    parser = table.arguments("rows", __doc__)
    parser.add_argument("--rows", type=int, default=20_000, metavar="N")
    args = parser.parse_args()
    settings, target = load_settings(), args.json and args.json.absolute()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        result = run(settings, Path(name), args.rows)
    counts = "; ".join(
        f"{outcome}: {', '.join(f'{n:,} {key}' for key, n in numbers.items())}" for outcome, numbers in result["rows"].items()
    )
    about = f"in the shape of llava_v1_5_mix665k; read in two ways. {counts}"
    head = measure.result("rows", f"{args.rows:,} rows", about, measure.prepare()) | {"clock": "wall time", "ratios": {}}
    print(table.report(head | result, target))


if __name__ == "__main__":
    main()
