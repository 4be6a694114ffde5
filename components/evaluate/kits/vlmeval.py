"""VLMEvalKit asks a served student and scores what it says, in a process and an environment of its own.

Each run has a fresh data folder and a fresh work folder; only TSV, CSV and JSON that this run wrote are read back, never the
kit's pickles. Answers stand in a journal of ours, so a run that is killed, or whose kit crashes, goes on where it stopped.

Light (`make` puts it in .venv/vlmeval): the kit's package alone, which is enough for our own sets. Full (`make vlmeval-env`, or
ALIGNTI_VLMEVAL_PYTHON): an environment with all it needs, which its own benchmarks need.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from components.artifacts import RUNS, write_text
from components.errors import DataError, InputError, TryAgainError
from components.evaluate.kits import export
from components.evaluate.kits.client import Endpoint
from components.evaluate.kits.inside import JUDGE, MODEL, NOTHING
from components.evaluate.kits.serve import last_words
from components.shards import Sample

FULL = "ALIGNTI_VLMEVAL_PYTHON"  # in the environment: the interpreter of the full kit
FULL_HERE = Path(".venv-vlmeval/bin/python")
ROOT = Path(__file__).parents[3]
CLIENTS = 4  # questions on their way at once: hides the client's work behind the server's, and lets vLLM batch
VERSION = """
import importlib.metadata, importlib.util, pathlib, subprocess
try:
    print(importlib.metadata.version("ms-vlmeval"))
except importlib.metadata.PackageNotFoundError:
    folder = pathlib.Path(importlib.util.find_spec("vlmeval").submodule_search_locations[0])
    print(subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout)
"""  # of the package, or the commit of a checkout
LONGEST_FIELD = 2**27  # characters of one TSV field: an image


@dataclass(frozen=True)
class Kit:
    """An interpreter that can import the kit, with what has to be on its path."""

    python: str
    path: Path | None  # the folder that holds the light kit; None for a full one
    version: str

    @property
    def light(self) -> bool:
        return self.path is not None


@dataclass(frozen=True)
class Scored:
    """What the kit made of its sets: per row its answer and, where the kit has a judge for the set, its verdict."""

    answers: dict[int, str]
    verdicts: dict[int, bool]
    figures: dict[str, float]
    failed: dict[int, str]
    overlong: list[int]


def kit(full: bool) -> Kit:
    """The kit as it is installed here. Raises InputError, with the command that installs it."""
    if full:
        python = os.environ.get(FULL) or (str(FULL_HERE) if FULL_HERE.exists() else None)
        if python is None:
            raise InputError("the full VLMEvalKit is not installed: `make vlmeval-env` does that (some GB)")
        try:
            said = subprocess.run([python, "-c", VERSION], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            raise InputError(f"{python} has no VLMEvalKit: `make vlmeval-env` installs it") from None
        return Kit(python, None, said)
    folder = Path(sys.prefix) / "vlmeval"
    found = sorted(folder.glob("ms_vlmeval-*.dist-info"))
    if not found or find_spec("pandas") is None:
        raise InputError(f"VLMEvalKit is not in {folder}: `make kits` puts it there")
    return Kit(sys.executable, folder, found[-1].name.removeprefix("ms_vlmeval-").removesuffix(".dist-info"))


def run(
    using: Kit, endpoint: Endpoint, sets: dict[str, str], plain: Sequence[str], folder: Path, journal: Path, new_tokens: int
) -> Path:
    """Let the kit ask and score `sets` (name -> form) whose files are in folder/data; returns its work folder.

    Raises TryAgainError if the kit's process ends badly: the answers that it had are in `journal`.
    """
    work, done, log = folder / "work", folder / "done.json", folder / "kit.log"
    for path in (work, done, log):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    work.mkdir(parents=True)
    job = {
        "light": using.light,
        "endpoint": endpoint._asdict(),
        "sets": sets,
        "plain": list(plain),
        "work": str(work.resolve()),
        "journal": str(journal.resolve()),
        "done": str(done.resolve()),
        "clients": CLIENTS,
        "max_new_tokens": new_tokens,
    }
    write_text(folder / "job.json", json.dumps(job, indent=2))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, using.path) if path),
        "LMUData": str((folder / "data").resolve()),
        "PRED_FORMAT": "tsv",
        "EVAL_FORMAT": "csv",
    }
    words = [using.python, "-m", "components.evaluate.kits.inside", str((folder / "job.json").resolve())]
    with log.open("w") as said:
        ended = subprocess.run(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    if ended.returncode or not done.exists():
        raise TryAgainError(
            f"VLMEvalKit ended with {ended.returncode}: {last_words(log)} (all of it: {log}); the answers that it had are kept"
        )
    return work


def score_split(
    using: Kit, endpoint: Endpoint, samples: Sequence[Sample], found: Sequence[export.KitSet], folder: Path, journal: Path,
    new_tokens: int,
) -> Scored:  # fmt: skip
    """Our own sets through the kit. Raises TryAgainError if it crashes, DataError if it lost an answer."""
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    for kit_set in found:
        export.write(kit_set, samples, data)
    forms = {kit_set.name: str(kit_set.form) for kit_set in found}
    work = run(using, endpoint, forms, list(forms), folder, journal, new_tokens)
    answers: dict[int, str] = {}
    verdicts: dict[int, bool] = {}
    figures: dict[str, float] = {}
    for kit_set in found:
        stem = f"{MODEL}_{kit_set.name}"
        told = {int(line["index"]): line["prediction"] for line in _table(work / f"{stem}.tsv")}
        if set(told) != set(kit_set.rows):
            raise DataError(f"{work / stem}.tsv: the kit answered {len(told)} of {len(kit_set.rows)} questions")
        answers |= {row: "" if text == NOTHING else text for row, text in told.items()}
        if kit_set.form == "mcq":
            marks = _table(work / f"{stem}_{JUDGE}_result.tsv")
            verdicts |= {int(line["index"]): float(line["hit"]) == 1 for line in marks}
        elif kit_set.form == "yes_no":
            verdicts |= {int(line["index"]): line["score"] == "True" for line in _table(work / f"{stem}_auxmatch.tsv")}
            total = next(line for line in _table(work / f"{stem}_score.csv") if line["split"] == "Overall")
            names = {"Overall": "f1", "acc": "accuracy", "precision": "precision", "recall": "recall"}
            figures |= {f"yes_no/{ours}": float(total[theirs]) / 100 for theirs, ours in names.items()}
    told_of = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    return Scored(
        answers=answers,
        verdicts=verdicts,
        figures=figures,
        failed={_row(name): reason for name, reason in told_of["failed"].items()},
        overlong=[_row(name) for name in told_of["overlong"]],
    )


def score_files(
    using: Kit, endpoint: Endpoint, tasks: Sequence[str], folder: Path, journal: Path, new_tokens: int
) -> dict[str, float]:
    """Benchmarks of the kit by name, and TSV files in its format, asked as the kit words them: `task/figure` -> value.

    Raises:
        InputError: a benchmark by name, with the light kit.
        DataError: a file with duplicate indices, missing images or missing columns; see `checked`.
    """
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    sets: dict[str, str] = {}
    for task in tasks:
        if not task.endswith(".tsv"):
            if using.light:
                raise InputError(f"{task} is a benchmark of the kit's own, which needs the full kit: `make vlmeval-env`")
            sets[task] = "stock"
            continue
        form = checked(Path(task))
        name = f"{Path(task).stem}{'_POPE' if form == 'yes_no' else ''}"
        shutil.copyfile(task, data / f"{name}.tsv")
        sets[name] = form
    work = run(using, endpoint, sets, [], folder, journal, new_tokens)
    figures: dict[str, float] = {}
    for name, scored_as in sets.items():
        if scored_as == "vqa":
            told = list(_table(work / f"{MODEL}_{name}.tsv"))
            right = [export.normalise(line["prediction"]) == export.normalise(line["answer"]) for line in told]
            figures[f"{name}/exact match (ours)"] = sum(right) / len(right)
        for file in sorted(work.glob(f"{MODEL}_{name}_*.csv")):
            for line in _table(file):
                split = line.pop("split", "")
                figures |= {f"{name}/{split}/{key}".replace("//", "/"): float(v) for key, v in line.items() if _number(v)}
    if not figures:
        raise DataError(f"{work}: the kit wrote no scores")
    return figures


def checked(path: Path) -> export.Form:
    """The form of a TSV in the kit's format. Raises DataError naming every row that the kit would lose or mix up."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    lines = list(_table(path))
    columns = set(lines[0]) if lines else set()
    missing = {"index", "question", "answer"} - columns
    if not lines or missing or not columns & {"image", "image_path"}:
        raise DataError(f"{path}: needs the columns index, question, answer and image or image_path, and a row")
    problems = [f"index {index} stands {n} times" for index, n in Counter(line["index"] for line in lines).items() if n > 1]
    images = {line["index"]: line.get("image", "") for line in lines}
    for line in lines:
        image = images[line["index"]] or line.get("image_path", "")
        shared = images.get(image, image)  # the kit lets a row name another whose image it shares
        if not image:
            problems.append(f"index {line['index']} has no image")
        elif not (_decodes(shared) or Path(line.get("image_path") or "\0").is_file()):
            problems.append(f"index {line['index']}: its image is missing or no base64")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(f"{path}: {'; '.join(problems[:5])}{more}; nothing was asked")
    if {"A", "B"} <= columns:
        return "mcq"
    return "yes_no" if {export.normalise(line["answer"]) for line in lines} <= {"yes", "no"} else "vqa"


def folder_of(arm: str) -> Path:
    return RUNS / "kits" / "vlmeval" / arm


def _decodes(image: str) -> bool:
    try:
        return len(base64.b64decode(image, validate=True)) > 16
    except ValueError:
        return False


def _table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV or TSV; text alone is read. Raises DataError if the kit did not write it."""
    csv.field_size_limit(LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    except FileNotFoundError:
        raise DataError(f"{path}: the kit did not write it; {path.parent.parent / 'kit.log'} says what it did") from None


def _row(name: str) -> int:
    return int(name.rsplit("/", 1)[1])


def _number(value: Any) -> bool:
    try:
        return value is not None and float(value) == float(value)
    except ValueError:
        return False
