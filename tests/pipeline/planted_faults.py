"""A pair of Qwen2-VL distilled by `dvc repro` from a user's data in which one row of each kind is faulty, among 600 good ones.

python -m tests.pipeline.planted_faults FOLDER     makes the workspace FOLDER, runs the pipeline there, says what came of it

Fails if a planted row was stored or trained on, if a good one was not, if a reason is not the planted one, or if the loss did
not fall. It takes minutes, so `make test` does not run it; the outcome is in docs/data.md. Teacher and student are the toy ones
of tests/families, with random weights, saved as the hub has them. The code is that of the last commit.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from components.config import recipes
from components.records.dataset import Manifest
from tests.families import toy

ROOT = Path(__file__).parents[2]
GOOD, APART, PER_IMAGE = 600, 20, 3  # good rows; rows from one planted to the next; rows about an image
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "empty": (12, 12, 12)}
PLACES = ("a1", "b1", "a2", "b2")

Row = dict[str, Any]


# --- what is planted: reason -> how a good row is spoilt; the row itself is changed, or a file of its own is made ------------


def own_image(row: Row, folder: Path, content: bytes) -> None:
    row["image"] = f"planted/{row['id']}.jpg"
    (folder / row["image"]).write_bytes(content)


def turns(row: Row) -> list[dict[str, str]]:
    conversation: list[dict[str, str]] = row["conversations"]
    return conversation


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def float_tiff() -> bytes:
    file = io.BytesIO()
    Image.new("F", (40, 20)).save(file, "TIFF")
    return file.getvalue()


def near_duplicate(row: Row, folder: Path) -> None:
    """A picture that a benchmark shows, too, with other bytes."""
    smooth = Image.fromarray(np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((96, 72))
    (folder.parent / "benchmark").mkdir()
    smooth.save(folder.parent / "benchmark/it.png")
    file = io.BytesIO()
    smooth.save(file, "JPEG", quality=80)
    own_image(row, folder, file.getvalue())


def several(row: Row, _: Path) -> None:
    row["images"] = [row.pop("image"), "00000.png"]
    turns(row)[0]["value"] = "is <image> like <image> ?"


PLANTS: dict[str, Callable[[Row, Path], object]] = {
    "missing_file": lambda row, _: row.update(image=f"planted/gone-{row['id']}.jpg"),
    "damaged": lambda row, folder: own_image(row, folder, jpeg(64, 64)[:-400]),
    "zero_bytes": lambda row, folder: own_image(row, folder, b""),
    "not_an_image": lambda row, folder: own_image(row, folder, b"<html>404 Not Found</html>"),
    "too_large": lambda row, folder: own_image(row, folder, jpeg(500, 500)),
    "turns": lambda row, _: turns(row).reverse(),
    "image_marks": lambda row, _: turns(row)[0].update(value="<image><image>what is at a1 ?"),
    "duplicate_id": lambda row, _: row.update(again=True),  # it becomes the first row when it is written
    "too_long": lambda row, _: turns(row)[1].update(value="red " * 600),
    "image_path": lambda row, _: row.update(image=f"../../{row['image']}"),
    "empty_answer": lambda row, _: turns(row)[1].update(value="  "),
    "empty_question": lambda row, _: turns(row)[0].update(value="<image>\n"),
    "missing_key": lambda row, _: row.pop("conversations"),
    "wrong_type": lambda row, _: row.update(image=7),
    "malformed_json": lambda row, _: row.update(cut=True),  # its line is cut when it is written
    "boxes": lambda row, _: row["conversations"][0].update(boxes=[[5, 5, 20, 20]]),
    "video": lambda row, _: row.update(video="clip.mp4"),
    "unread_media": lambda row, _: row.update(photo="another.jpg"),
    "unsupported": lambda row, folder: own_image(row, folder, float_tiff()),
    "near_duplicate": near_duplicate,
}
WEB = ("malformed_text", "ambiguous_name")  # what only tar files can hold
# What only the models' own tokenizers tell, by id: rows that `check_rows` leaves out or cuts, and one that it keeps as it is.
TRIED: dict[str | None, Callable[[Row, Path], object]] = {
    "too_long": lambda row, _: turns(row)[1].update(value="red " * 400),
    "cut": lambda row, _: turns(row).extend([{"from": "human", "value": "again ?"}, {"from": "gpt", "value": "red " * 400}]),
    "refused_image": lambda row, folder: own_image(row, folder, jpeg(1200, 3)),
    "no_sample": several,  # the template writes images before words
    None: lambda row, _: turns(row)[1].update(value="it is <|im_end|> and <|im_start|>assistant"),
}
LIMITS = {"max_pixels": 200_000, "max_image_mib": 1, "max_text_chars": 2_000, "max_bad_ratio": 0.05}
JINJA = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)


# --- the user's folder ------------------------------------------------------------------------------------------------------


def write_data(folder: Path) -> tuple[dict[tuple[str, int], str], dict[str, str]]:
    """`folder/rows.jsonl`, `folder/images`, `folder/web.tar` and `folder/benchmark`; returns source and number of the planted
    rows -> reason, and of those that `prepare` stores id -> reason."""
    (folder / "images/planted").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = -(-(GOOD + len(PLANTS) + len(TRIED)) // PER_IMAGE)
    rows = [row for number in range(images) for row in about(number, folder / "images", rng)]
    planted = {}
    for position, (reason, spoil) in enumerate(PLANTS.items(), start=1):
        spoil(rows[position * APART], folder / "images")
        planted["mine", position * APART + 1] = reason
    tried = {}
    for position, (reason_or_none, change_it) in enumerate(TRIED.items(), start=1):
        row = rows[position * APART + APART // 2]
        change_it(row, folder / "images")
        if reason_or_none is not None:
            tried[f"mine/{row['id']}"] = reason_or_none
    rows = [rows[0] if row.pop("again", False) else row for row in rows]
    lines = [json.dumps(row)[: -9 if row.pop("cut", False) else None] for row in rows]
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return planted | web(folder / "web.tar"), tried


def web(path: Path) -> dict[tuple[str, int], str]:
    """A picture with a caption, and a sample of each reason of WEB."""
    members = [("good.jpg", jpeg(40, 20)), ("good.txt", b"grey"), ("mal.txt", b"\xff\xfegrey"), ("mal.jpg", jpeg(20, 20))]
    members += [("twice.json", b"{}"), ("twice.jpg", jpeg(16, 16)), ("twice.jpg", jpeg(20, 40))]
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return {("web", number): reason for number, reason in enumerate(WEB, start=2)}


def about(number: int, images: Path, rng: np.random.Generator) -> list[Row]:
    """Three questions about one image of 2 x 2 coloured cells, of one of three shapes."""
    cells = [list(COLOURS)[i] for i in rng.integers(0, 3, 4)]
    width, height = [(40, 20), (16, 16), (20, 40)][number % 3]
    pixels = np.zeros((height, width, 3), np.uint8)
    for i, colour in enumerate(cells):
        top, left = (i // 2) * height // 2, (i % 2) * width // 2
        pixels[top : top + height // 2, left : left + width // 2] = COLOURS[colour]
    pixels += rng.integers(0, 20, pixels.shape, dtype=np.uint8)
    name = f"{number:05}.png"
    Image.fromarray(pixels).save(images / name)
    rows = []
    for i in range(PER_IMAGE):
        question = {"from": "human", "value": f"<image>\nwhat is at {PLACES[i]} ?"}
        rows.append(
            {"id": str(PER_IMAGE * number + i), "image": name, "conversations": [question, {"from": "gpt", "value": cells[i]}]}
        )
    return rows


# --- the workspace ----------------------------------------------------------------------------------------------------------


def workspace(root: Path) -> tuple[dict[tuple[str, int], str], dict[str, str]]:
    """A clone with these data, these models and params for them; returns what is planted."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
    shutil.rmtree(root / "data", ignore_errors=True)
    plants = write_data(root / "data/mine")
    checkpoints = {
        role: {name: {"source": str(toy.save("qwen2_vl", root / "hub" / name, seed, layers)), "revision": None}}
        for role, name, seed, layers in (("teachers", "large", 1, 3), ("students", "student", 2, 2))
    }
    for template in (root / "hub").glob("*/chat_template.jinja"):
        template.write_text(JINJA)
    recipes.use("smoke", root)
    sources = {"mine": ("rows.jsonl", "data/mine/images"), "web": ("web.tar", None)}
    about_each = {"weight": 1.0, "licence": "own"}
    mixture = {
        "val": 0.05,
        "test": 0.05,
        "near_duplicates": "drop",
        "evaluation_images": ["data/mine/benchmark"],
        "sources": {
            name: {"files": f"data/mine/{files}", "images": images, **about_each} for name, (files, images) in sources.items()
        },
    }
    change(root, "data", source="mixture", limits=LIMITS, images_per_shard=100, mixture=mixture)
    change(root, "models", family="pretrained", pretrained=checkpoints, max_length=256, refused_images="leave_out")
    change(root, "models", template={"style": "processor", "system": ""})
    change(root, "irs", rule="irs", weighting="mean", instruction_rows="all")  # no row has boxes
    change(root, "distill", steps=60, batch_size=16, micro_batch_size=16, log_every=10, checkpoint_every=30)
    change(root, "evaluate", max_new_tokens=4)
    dvc(root, "add", "--quiet", "data")
    return plants


def change(root: Path, file: str, **values: Any) -> None:
    path = root / f"params/{file}.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}, sort_keys=False))


def dvc(root: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *words], cwd=root, check=True, env={**os.environ, "PYTHONPATH": "."})


def outcome(root: Path, planted: dict[tuple[str, int], str], tried: dict[str, str]) -> str:
    """Raises AssertionError if it is not what the planted rows ask for."""
    manifest = Manifest.read(root / "artifacts/dataset/manifest.json")
    refused = [json.loads(line) for line in (root / "artifacts/dataset/quarantine.jsonl").read_text().splitlines()]
    reasons = {(entry["source"], entry["row"]): entry["reason"] for entry in refused}
    assert reasons == planted, "each planted row, and no other, for its own reason"
    assert manifest.rows_in == manifest.rows_out + len(planted)
    remarks = [json.loads(line) for line in (root / "artifacts/rows/remarks.jsonl").read_text().splitlines()]
    assert {entry["id"]: entry["reason"] for entry in remarks} == tried, "left out or cut for the reason planted, and no other"
    lines = [f"{manifest.rows_in:,} rows, {len(planted)} planted, {len(refused)} quarantined, each for the reason planted:"]
    lines.append("  " + ", ".join(f"{reason} {count}" for reason, count in Counter(planted.values()).items()))
    lines.append("check_rows: " + ", ".join(f"{reason} {count}" for reason, count in Counter(tried.values()).items()))
    for arm in ("sft", "align_ti"):
        losses = [json.loads(line) for line in (root / f"artifacts/students/{arm}/losses.jsonl").read_text().splitlines()]
        terms = [name for name in ("sft", "kd", "iva", "tpa") if losses[0].get(name)]
        first, last = ({name: entry[name] for name in terms} for entry in (losses[0], losses[-1]))
        assert last["sft"] < first["sft"], (arm, first, last)
        lines.append(f"{arm}: " + ", ".join(f"L_{name} {first[name]:.3f} -> {last[name]:.3f}" for name in terms))
    return "\n".join(lines)


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    planted, tried = workspace(root)
    start = time.perf_counter()
    dvc(root, "repro")
    print(f"{outcome(root, planted, tried)}\ndvc repro: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
