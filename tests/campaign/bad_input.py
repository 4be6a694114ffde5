"""Bad input: whatever is damaged, a sentence and exit code 2 (or a quarantined row), never a traceback, a hang, a stray file.

Each kind takes something good, damages it and hands it to the code that reads it, in a process of its own: an
`AlignTIError` or a result is right, anything else is a fault.
"""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from components.config import recipes
from components.config.data import DataSettings
from components.config.load import load_settings
from components.dataset.prepare import prepare
from components.errors import AlignTIError
from components.study import expand
from tests.campaign.mutate import ODD, altered, as_json, damaged

ROOT = Path(__file__).parents[2]
LONGEST_S = 10  # of processor time, as others may want the machine too
STUCK_S = 600
Try = Callable[[random.Random, Path], object]


class TooLongError(Exception):
    pass


def picture(format: str = "PNG", px: int = 32) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((px, px), 64).convert("RGB").save(file, format)
    return file.getvalue()


PICTURES = [picture(), picture("JPEG"), picture("WEBP"), picture("GIF")]
SHAPES: list[dict[str, Any]] = [  # of one row each, beside its picture; docs/data.md has the rest of them
    {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]},
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"text": "What?"}]}, {"role": "model", "content": "That."}]},
    {"texts": [{"user": "What?", "assistant": "That.", "boxes": [[0.1, 0.1, 0.9, 0.9]]}] * 2, "kind": "detail"},
    {"prompt": [{"role": "user", "content": "What?"}], "completion": [{"role": "assistant", "content": "That."}], "system": ""},
    {"txt": "A picture."},
]  # fmt: skip
ROWS = [
    {"id": f"row {number}", ("image", "images")[number % 2]: (picture, [picture])[number % 2], **shape}
    for number, shape in enumerate(SHAPES * 5)
    for picture in [f"{number % 4}.png"]
]
EMPTY = {key: None for row in ROWS for key in row}
COMMANDS = (
    *("use", "check", "plan", "arms", "runs", "study expand", "study run", "compare", "try", "export", "serve", "samples"),
    *("promote", "register", "reproduce", "benchmarks", "leaderboard", "init", "evaluate"),
)
PRINTABLE = [str(word) for word in ODD if word is not None and not {"\0", "\ud800"} & set(str(word)) and len(str(word)) < 500]
ARGUMENTS = [*PRINTABLE, "--help", "sft", "--image", "-1", "--vs", "--kit", "--data"]
ENDINGS = (".json", ".jsonl", ".tar", ".parquet")


def params(rng: random.Random, cwd: Path) -> object:
    """A params file, as a user edits it."""
    source = rng.choice(sorted((ROOT / "params").glob("*.yaml")))
    for file in (ROOT / "params").glob("*.yaml"):
        _write(cwd / "params" / file.name, file.read_bytes())
    if rng.random() < 0.5:
        content = _yaml(altered(yaml.safe_load(source.read_text()), rng))
    else:
        content = damaged(source.read_bytes(), rng)
    _write(cwd / "params" / source.name, content)
    return load_settings(cwd)


def recipe(rng: random.Random, cwd: Path) -> object:
    """A recipe or a study of a user's own."""
    for file in (ROOT / "params").glob("*.yaml"):
        _write(cwd / "params" / file.name, file.read_bytes())
    kind = rng.choice(["recipes", "studies"])
    source = rng.choice(sorted((ROOT / "params" / kind).glob("*.yaml")))
    value = altered(yaml.safe_load(source.read_text()), rng)
    _write(cwd / "params" / kind / "mine.yaml", _yaml(value))
    return recipes.merged("mine", cwd) if kind == "recipes" else expand.cells("mine", cwd)


def rows(rng: random.Random, cwd: Path) -> object:
    """Rows of one's own, and the pictures beside them, of every format that is read."""
    for number, content in enumerate(PICTURES):
        _write(cwd / "images" / f"{number}.png", damaged(content, rng) if rng.random() < 0.2 else content)
    examples = [altered(row, rng) if rng.random() < 0.3 else row for row in ROWS]
    ending = rng.choice(ENDINGS)
    content = _file(examples, ending, rng)
    _write(cwd / f"rows{ending}", damaged(content, rng) if rng.random() < 0.4 else content)
    images = str(cwd / "images") if ending in (".json", ".jsonl") else None
    source = {"files": str(cwd / f"rows{ending}"), "images": images, "weight": 1.0, "licence": "CC0"}
    raw = load_settings(ROOT).data.model_dump(mode="json") | {"source": "mixture", "images_per_shard": 8}
    raw["mixture"] = {"sources": {"mine": source}, "val": 0.2, "test": 0.2, "evaluation_images": [], "near_duplicates": "drop"}
    raw["limits"]["max_bad_ratio"] = 1.0
    return prepare(DataSettings.model_validate(raw), target=cwd / "out", workers=1)


def arguments(rng: random.Random, cwd: Path) -> object:
    """Arguments of `alignti`."""
    args = [*rng.choice(COMMANDS).split(), *rng.choices(ARGUMENTS, k=rng.randrange(4))]
    if args[:2] == ["study", "run"]:
        args.insert(2, "no such study")
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(cwd / "clone")], check=True)
    command = [sys.executable, "-m", "components.cli", *args]
    result = subprocess.run(command, cwd=cwd / "clone", capture_output=True, text=True, timeout=STUCK_S, errors="replace")
    assert "Traceback" not in result.stderr, f"{args}: {result.stderr[-600:]}"
    assert result.returncode in (0, 2, 75), f"{args}: exit code {result.returncode}, {result.stderr[-300:]}"
    return result


KINDS: dict[str, Try] = {"params": params, "recipe": recipe, "rows": rows, "arguments": arguments}


def discard_progress() -> None:
    """Discard what this process writes to stderr: the progress bars of the code under test."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def run_try(kind: str, seed: str, cwd: Path) -> str | None:
    """The fault of this try, or None."""
    existing = set(cwd.parent.iterdir())
    try:
        with _unstuck():
            if _seconds(kind, seed, cwd / "once") > LONGEST_S:  # a first try imports torch and more
                seconds = _seconds(kind, seed, cwd / "again")
                assert seconds <= LONGEST_S, f"computes for {seconds:.0f} s"
    except Exception as error:  # the finding itself
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    stray = set(cwd.parent.iterdir()) - existing - {cwd} or set(cwd.iterdir()) - {cwd / "once", cwd / "again"}
    return f"wrote outside its folder: {sorted(map(str, stray))}" if stray else None


def _seconds(kind: str, seed: str, cwd: Path) -> float:
    """Processor time of one try in this process."""
    cwd.mkdir()
    began = time.process_time()
    try:
        KINDS[kind](random.Random(seed), cwd)
    except AlignTIError as error:
        assert str(error).strip(), f"{type(error).__name__} without a sentence"
    return time.process_time() - began


@contextmanager
def _unstuck() -> Iterator[None]:
    """Raise TooLongError in a block that hangs."""

    def late(_signum: int, _frame: object) -> None:
        raise TooLongError(f"not done in {STUCK_S} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(STUCK_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _file(examples: list[Any], ending: str, rng: random.Random) -> bytes:
    if ending == ".json":
        return as_json(examples, rng)
    if ending == ".jsonl":
        return b"\n".join(as_json(row, rng) for row in examples)
    file = io.BytesIO()
    if ending == ".parquet":
        try:
            pq.write_table(pa.Table.from_pylist([EMPTY | row for row in examples if isinstance(row, dict)]), file)
        except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):  # no column holds such values
            pq.write_table(pa.Table.from_pylist(ROWS[:1]), file)
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, row in enumerate(examples):
            for name, content in ((f"{number}.json", as_json(row, rng)), (f"{number}.png", rng.choice(PICTURES))):
                member = tarfile.TarInfo(rng.choice([name, name, name, f"../{name}", f"/{name}", name.upper()]))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
