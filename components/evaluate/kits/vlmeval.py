"""Bridge to VLMEvalKit, which evaluates a served student from a separate process and environment.

Each run has a fresh data folder and a fresh work folder; only TSV, CSV and JSON files of this run are read back, never the
kit's pickles. Answers are kept in our own journal, so a run resumes after a kill or a crash of the kit.

Light (`make kits` puts it in .venv/vlmeval): the kit's package alone, enough for our own sets and for the benchmarks
of components/evaluate/benchmarks.py, video aside. Full (`make vlmeval-env`, or ALIGNTI_VLMEVAL_PYTHON): an environment
with the dependencies of the kit's other benchmarks.
"""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from components.config.yaml_file import is_number
from components.dataset.shards import Sample
from components.errors import DataError, InputError, TryAgainError
from components.evaluate.benchmarks import BENCHMARKS
from components.evaluate.kits import export
from components.evaluate.kits.client import Endpoint
from components.evaluate.kits.scores import KitResult
from components.evaluate.kits.serve import last_line
from components.evaluate.kits.vlmeval_worker import EMPTY_ANSWER, EXIT_UNSUPPORTED, JUDGE, MODEL
from components.evaluate.metrics import normalise
from components.io import write_table, write_text

FULL = "ALIGNTI_VLMEVAL_PYTHON"  # environment variable with the full kit's interpreter
DATA = "LMUData"  # environment variable with the kit's folder of benchmark files
FULL_HERE = Path(".venv-vlmeval/bin/python")
ROOT = Path(__file__).parents[3]
CLIENTS = 4  # concurrent requests: overlaps client and server work, and lets vLLM batch
POLL_S = 0.5
VERSION = """
import importlib.metadata, importlib.util, pathlib, subprocess
try:
    print(importlib.metadata.version("ms-vlmeval"))
except importlib.metadata.PackageNotFoundError:
    folder = pathlib.Path(importlib.util.find_spec("vlmeval").submodule_search_locations[0])
    print(subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout)
"""  # prints the package's version, or the commit of a checkout
KIT_NAMES = {benchmark.kit_dataset for benchmark in BENCHMARKS.values()}
LONGEST_FIELD = 2**27  # maximum characters of one TSV field: a base64 image


@dataclass(frozen=True)
class Kit:
    """Interpreter that can import the kit, with its extra import path."""

    python: str
    path: Path | None  # folder of the light kit; None for a full one
    version: str


@dataclass(frozen=True)
class Session:
    """Served student, with the kit and the journal of its answers."""

    kit: Kit
    endpoint: Endpoint
    folder: Path
    journal: Path
    new_tokens: int
    title: str = "vlmeval"  # title of the progress bar


class QuestionFile(NamedTuple):
    """TSV file in the kit's format, named on the command line."""

    path: Path
    form: str  # as in Job.sets
    questions: int


@dataclass(frozen=True)
class Job:
    """Data sets of one run of the kit's process."""

    data: Path  # the kit's data folder
    sets: dict[str, str]  # name -> mcq, yes_no, vqa, or stock for a benchmark of the kit's
    questions: int | None  # None: not known before the kit loads the benchmark
    plain: bool = False  # prompts as in training, without the kit's templates
    md5: dict[str, str] = field(default_factory=dict)  # MD5 of user files in place of a benchmark's
    blank: bool = False  # a plain grey image in place of each image: blind baseline


def kit(full: bool) -> Kit:
    """Installed kit. Raises InputError, with the install command, if there is none."""
    if full:
        python = os.environ.get(FULL) or str(FULL_HERE)
        try:
            version = subprocess.run([python, "-c", VERSION], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            raise InputError(f"{python} has no VLMEvalKit: `make vlmeval-env` installs it") from None
        return Kit(python, None, version)
    folder = Path(sys.prefix) / "vlmeval"
    dist_infos = sorted(folder.glob("ms_vlmeval-*.dist-info"))
    if not dist_infos or find_spec("pandas") is None:
        raise InputError(f"VLMEvalKit is not in {folder}: `make kits` puts it there")
    return Kit(sys.executable, folder, dist_infos[-1].name.removeprefix("ms_vlmeval-").removesuffix(".dist-info"))


def kit_for_benchmarks() -> Kit:
    """Full kit if installed, which has more benchmarks; else the light one. Raises as `kit`."""
    return kit(full=FULL in os.environ or FULL_HERE.exists())


def run(session: Session, job: Job) -> dict[str, Any]:
    """Run the job's sets in the kit's process, with results in folder/work; returns the worker's summary.

    Raises:
        InputError: the kit has no such benchmark, or one that is not about images.
        TryAgainError: the kit's process fails; its answers so far are in the journal.
    """
    folder, journal = session.folder.resolve(), session.journal.resolve()
    work, done, log = folder / "work", folder / "done.json", folder / "kit.log"
    for path in (work, done, log):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    work.mkdir(parents=True)
    journal.touch()
    spec = asdict(job) | {"light": session.kit.path is not None, "endpoint": session.endpoint._asdict(), "clients": CLIENTS}
    spec |= {"work": work, "journal": journal, "done": done, "max_new_tokens": session.new_tokens}
    write_text(folder / "job.json", json.dumps(spec, indent=2, default=str))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, session.kit.path) if path),
        DATA: str(job.data.resolve()),
        "PRED_FORMAT": "tsv",
        "EVAL_FORMAT": "csv",
    }
    argv = [session.kit.python, "-m", "components.evaluate.kits.vlmeval_worker", str(folder / "job.json")]
    with tqdm(total=job.questions, desc=session.title, unit="question") as bar:
        exit_code = _run_worker(argv, environment, log, journal, bar)
    if exit_code == EXIT_UNSUPPORTED:
        raise InputError(last_line(log))
    if exit_code or not done.exists():
        reason = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with {exit_code}: {last_line(log)}"
        raise TryAgainError(f"VLMEvalKit {reason} (all that it said: {log}); the answers that it had are kept")
    return dict(json.loads(done.read_text(encoding="utf-8")))


def _run_worker(argv: Sequence[str], environment: dict[str, str], log: Path, journal: Path, bar: tqdm[Any]) -> int:
    """Exit code of the kit's process; `bar` follows the answers in the journal. An interrupt terminates the process."""
    with log.open("w") as output, journal.open("rb") as answers:
        process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while True:
                try:
                    return process.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    bar.update(answers.read().count(b"\n"))
        finally:
            process.terminate()  # nothing happens to one that has ended
            process.wait()


def score_split(session: Session, samples: Sequence[Sample], kit_sets: Sequence[export.KitSet], seed: int) -> KitResult:
    """Score our own sets with the kit. Raises TryAgainError if it crashes, DataError if an answer is missing."""
    data = _fresh_data_folder(session.folder)
    for kit_set in kit_sets:
        export.write(kit_set, samples, data / f"{kit_set.name}.tsv", seed)
    forms: dict[str, str] = {kit_set.name: kit_set.form for kit_set in kit_sets}
    summary = run(session, Job(data, forms, questions=sum(len(kit_set.rows) for kit_set in kit_sets), plain=True))
    work = session.folder / "work"
    answers: dict[int, str] = {}
    verdicts: dict[int, bool] = {}
    figures: dict[str, float] = {}
    for kit_set in kit_sets:
        stem = f"{MODEL}_{kit_set.name}"
        predictions = {int(line["index"]): line["prediction"] for line in table(work / f"{stem}.tsv")}
        if set(predictions) != set(kit_set.rows):
            raise DataError(f"{work / stem}.tsv: the kit answered {len(predictions)} of {len(kit_set.rows)} questions")
        answers |= {row: "" if text == EMPTY_ANSWER else text for row, text in predictions.items()}
        if kit_set.form == "mcq":
            marks = table(work / f"{stem}_{JUDGE}_result.tsv")
            verdicts |= {int(line["index"]): float(line["hit"]) == 1 for line in marks}
        elif kit_set.form == "yes_no":
            verdicts |= {int(line["index"]): line["score"] == "True" for line in table(work / f"{stem}_auxmatch.tsv")}
            total = next(line for line in summary["figures"][kit_set.name] if line["split"] == "Overall")
            names = {"Overall": "f1", "acc": "accuracy", "precision": "precision", "recall": "recall"}
            figures |= {f"yes_no/{our_name}": float(total[kit_name]) / 100 for kit_name, our_name in names.items()}
    return KitResult(
        answers=answers,
        verdicts=verdicts,
        figures=figures,
        failed={_row_of_image(name): reason for name, reason in summary["failed"].items()},
        overlong=[_row_of_image(name) for name in summary["overlong"]],
    )


def score_tasks(session: Session, tasks: Sequence[str], blank: bool = False) -> dict[str, float]:
    """Score the kit's benchmarks and TSV files in its format, with the kit's prompts: `task/figure` -> value.

    A task is the NAME of a benchmark, whose file the kit keeps in $LMUData (~/LMUData); NAME=FILE.tsv, the same with a local
    file; or FILE.tsv, a set of your own. With `blank` each image is a plain grey one, and the figures' names say so.

    Raises:
        InputError: the kit has no such benchmark.
        DataError: a file with duplicate indices, missing images or missing columns; see `check_tsv`.
    """
    files = [task for task in tasks if task.endswith(".tsv")]
    figures: dict[str, float] = {}
    if files:
        figures |= _score_job(session, _files(check_files(files), _fresh_data_folder(session.folder), blank))
    benchmarks = [task for task in tasks if task not in files]
    if benchmarks:
        data_folder = Path(os.environ.get(DATA) or "~/LMUData").expanduser()
        data_folder.mkdir(parents=True, exist_ok=True)  # for a missing folder the kit falls back to another
        figures |= _score_job(session, Job(data_folder, dict.fromkeys(benchmarks, "stock"), questions=None, blank=blank))
    return figures


def check_files(tasks: Iterable[str]) -> dict[str, QuestionFile]:
    """TSV files of the tasks by the names of their data sets. Raises InputError for a name that two have, or of a benchmark
    whose rule would not be used; DataError as `check_tsv`."""
    files: dict[str, QuestionFile] = {}
    for task in dict.fromkeys(tasks):
        name, _, path = task.partition("=")
        benchmark, path = (name, path) if path and not Path(task).is_file() else ("", task)
        form, questions = check_tsv(Path(path))
        name = benchmark or f"{Path(path).stem}{'_POPE' * (form == 'yes_no')}"
        if not benchmark and name in KIT_NAMES:
            raise InputError(f"{path} has a benchmark's name: --task {name}={path} scores it by its rule; else rename the file")
        if form == "mcq" and not benchmark:
            unnamed = [line["index"] for line in table(Path(path)) if not line.get(line["answer"])]
            if unnamed:
                raise DataError(f"{path}: the answer of index {unnamed[0]} is not the letter of one of its options")
        if name in files:
            raise InputError(f"{files[name].path} and {path} would both be data set {name}: rename one, or run it by itself")
        files[name] = QuestionFile(Path(path), "stock" if benchmark else form, questions)
    return files


def _files(files: Mapping[str, QuestionFile], data: Path, blank: bool) -> Job:
    """Job over checked files, copied to the kit's data folder."""
    md5: dict[str, str] = {}
    for name, file in files.items():
        if file.form == "yes_no":
            # The kit requires a category and compares answers with `Yes` and `No`, case-sensitive.
            lines = [{"category": "all", **line, "answer": normalise(line["answer"]).capitalize()} for line in table(file.path)]
            write_table(data / f"{name}.tsv", lines, delimiter="\t")
            continue
        copied = shutil.copyfile(file.path, data / f"{name}.tsv")
        if file.form == "stock":
            md5[name] = hashlib.md5(copied.read_bytes(), usedforsecurity=False).hexdigest()
    questions = sum(file.questions for file in files.values())
    return Job(data, {name: file.form for name, file in files.items()}, questions, md5=md5, blank=blank)


def _score_job(session: Session, job: Job) -> dict[str, float]:
    summary = run(session, job)
    figures: dict[str, float] = {}
    for name, form in job.sets.items():
        label = f"{name} (file {summary['md5'][name][:8]}, not the kit's)" if name in summary["md5"] else name
        label += ", blank images" if job.blank else ""
        lines = list(table(session.folder / "work" / f"{MODEL}_{name}.tsv"))
        if form == "vqa":
            correct = [normalise(line["prediction"]) == normalise(line["answer"]) for line in lines]
            figures[f"{label}/exact match (ours)"] = sum(correct) / len(correct)
        for row in summary["figures"].get(name, []):
            split = row.pop("split", "")
            figures |= {f"{label}/{split}/{key}".replace("//", "/"): float(v) for key, v in row.items() if is_number(str(v))}
        empty = sum(line["prediction"] == EMPTY_ANSWER for line in lines)
        if empty:
            figures[f"{label}/no answer"] = float(empty)
    return figures


def _fresh_data_folder(folder: Path) -> Path:
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    return data


def check_tsv(path: Path) -> tuple[export.Form, int]:
    """Form of a TSV in the kit's format, and its number of questions.

    Raises DataError naming up to five rows that the kit would lose or mix up.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    lines = list(table(path))
    columns = set(lines[0]) if lines else set()
    missing = {"index", "question", "answer"} - columns
    if not lines or missing or not columns & {"image", "image_path"}:
        raise DataError(f"{path}: needs the columns index, question, answer and image or image_path, and a row")
    uneven = [line["index"] for line in lines if None in line or None in line.values()]
    if uneven:
        raise DataError(
            f"{path}: index {uneven[0]} has more or fewer cells than the header: a tab or a quote in a text, perhaps;"
            ' put such a text in "...", with each quote in it doubled'
        )
    problems = [f"index {index} stands {n} times" for index, n in Counter(line["index"] for line in lines).items() if n > 1]
    images = {line["index"]: line.get("image", "") for line in lines}
    for line in lines:
        image = images[line["index"]] or line.get("image_path", "")
        content = images.get(image, image)  # in the kit's format a row may refer to another's image by index
        if not image:
            problems.append(f"index {line['index']} has no image")
        elif not (_is_picture(content) or Path(line.get("image_path") or "\0").is_file()):
            problems.append(f"index {line['index']}: its image is missing, or no picture in base64")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(f"{path}: {'; '.join(problems[:5])}{more}; nothing was asked")
    if {"A", "B"} <= columns:
        return "mcq", len(lines)
    return ("yes_no" if {normalise(line["answer"]) for line in lines} <= {"yes", "no"} else "vqa"), len(lines)


def _is_picture(image: str) -> bool:
    """True for a base64 image, or a list of them, that decodes; the kit reads 64 characters or less as another row's index."""
    try:
        for encoded in ast.literal_eval(image) if image.startswith("[") else [image]:
            with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as picture:
                picture.verify()
        return len(image) > 64
    except (ValueError, OSError, SyntaxError):  # no base64, no image, or (PNG) a broken one
        return False


def table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV or TSV, as text. Raises DataError if the file is missing, or no UTF-8."""
    csv.field_size_limit(LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error.reason}); save it as UTF-8") from None
    except FileNotFoundError:
        raise DataError(f"{path}: the kit did not write it; {path.parent.parent / 'kit.log'} says what it did") from None


def _row_of_image(name: str) -> int:
    """Row of a question by the name of its first image, `SET/ROW`, or `SET/ROW_0` of several."""
    return int(name.rsplit("/", 1)[1].partition("_")[0])
