from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.config import recipes
from components.config.merge import text_of
from tests.families import toy

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 60, 220), "grey": (120, 120, 120)}


def draw(folder: Path, images: int = 20) -> Path:
    """`folder/rows.json` and `folder/images`: two questions about each of so many drawn images."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(images):
        colour = list(COLOURS)[number % 4]
        image = Image.new("RGB", (40 + number % 3, 40), COLOURS[colour])
        image.putpixel((number % 40, number // 40), (255, 255, 255))
        image.save(folder / f"images/{number}.png")
        for index, (question, answer) in enumerate({"What colour ?": f"It is {colour} .", "How many ?": "one"}.items()):
            turns = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
            rows.append(
                {"id": f"{number}-{index}", "image": f"{number}.png", "kind": question.split()[0].lower(), "messages": turns}
            )
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def respell(folder: Path, change: Callable[[list[Any]], object]) -> None:
    rows = json.loads((folder / "rows.json").read_text())
    change(rows)
    (folder / "rows.json").write_text(json.dumps(rows))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params, twenty drawn images under data/mine, and two toy checkpoints under hub/."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "params", tmp_path / "params")
    draw(tmp_path / "data/mine")
    for name, seed, layers in (("large", 1, 3), ("small", 2, 2)):
        shutil.copytree(toy.folder("smolvlm", seed, layers), tmp_path / "hub" / name)
    return tmp_path


@pytest.fixture
def pointed(project: Path) -> Path:
    """`project`, with params that name its files."""
    overlay: dict[str, Any] = {
        "about": {"run": "-", "hardware": "-", "time": "-", "result": "-", "seconds": None},
        "like": "_full-size",
        "data": {
            "source": "llava",
            "llava": {"annotations": "data/mine/rows.json", "images": "data/mine/images", "val": 0.2, "test": 0.2},
        },
        "models": {
            "pretrained": {
                "teachers": {"teacher": {"source": "hub/large", "revision": None}},
                "students": {"student": {"source": "hub/small", "revision": None}},
            }
        },
    }
    (project / "params/recipes/mine.yaml").write_text(text_of(overlay))
    recipes.use("mine")
    return project
