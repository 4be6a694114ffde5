"""VLMEvalKit's worker process: `python -m components.evaluate.kits.vlmeval_worker JOB.json`

The kit switches off TLS verification on import, overwrites the environment from a .env file and reads pickles: it is never
imported elsewhere. Our modules imported here use the standard library alone, as the kit's environment may have nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import io
import json
import os
import ssl
import string
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from components.evaluate.journal import Journal
from components.evaluate.kits.client import Endpoint, RequestRejected, chat_completion

EMPTY_ANSWER = "\u2205"  # placeholder for an empty, overlong or missing answer; matches no option, yes or no
LONGEST = 10_000  # maximum characters of an answer; the kit would accept an option at the end of any length
MODEL = "student"
JUDGE = "exact_matching"
LIGHT_MODULES = ("image_mcq", "image_yorn", "image_vqa")  # benchmark modules without the kit's 75 dependencies
GREY = (127, 127, 127)
EXIT_UNSUPPORTED = 2  # exit code of an unknown or non-image benchmark


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if job["light"]:
        _stub_packages()
    verifying_context = ssl.create_default_context
    import vlmeval  # noqa: F401

    ssl._create_default_https_context = verifying_context  # restores the verification that the import switched off
    _save_once()
    from vlmeval.inference import infer_data_job

    student, figures = _student(job), {}
    for name, form in job["sets"].items():
        with nullcontext() if form == "stock" else _texts_as_written():
            dataset = _dataset(name, form, job)
            infer_data_job(student, work_dir=job["work"], model_name=MODEL, dataset=dataset, api_nproc=job["clients"])
            if form == "vqa":
                continue
            result = dataset.evaluate(f"{job['work']}/{MODEL}_{name}.tsv", model=JUDGE, nproc=1)
            figures[name] = [result] if isinstance(result, dict) else result.to_dict("records")
    summary = {"failed": student.failed, "overlong": student.overlong, "figures": figures, "md5": job["md5"]}
    Path(job["done"]).write_text(json.dumps(summary, default=lambda number: number.item()), encoding="utf-8")


def _stub_packages() -> None:
    """Replace the kit's packages that import all its models and benchmarks by empty ones with the same `__path__`.

    Required modules are then imported one by one, without the 75 dependencies of the rest.
    """
    spec = importlib.util.find_spec("vlmeval")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("vlmeval is not in this environment")
    root = Path(spec.submodule_search_locations[0])
    for name in ("vlmeval", "vlmeval.dataset", "vlmeval.api", "vlmeval.vlm", "vlmeval.config"):
        package: Any = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    modules: Any = sys.modules
    modules["vlmeval.dataset"].DATASET_TYPE = lambda name, **_: "VQA"
    modules["vlmeval.dataset"].DATASET_MODALITY = lambda name, **_: "IMAGE"
    modules["vlmeval.config"].supported_VLM = {}


def _save_once() -> None:
    """Patch the kit's loop to dump results once, at its end: it rewrites all of them per question, O(n^2) in questions.

    A kill loses nothing: answers are in the journal, and the next run starts in a fresh folder.
    """
    from vlmeval import utils
    from vlmeval.smp import dump, load

    track_progress = utils.track_progress_rich

    def tracked(
        func: Any, tasks: Any = (), nproc: int = 1, save: str | None = None, keys: Any = None, **more: Any
    ) -> list[Any]:
        results: list[Any] = track_progress(func, tasks, nproc, **more)
        if save is not None and keys is not None:
            dump((load(save) if Path(save).exists() else {}) | dict(zip(keys, results, strict=True)), save)
        return results

    for module in list(sys.modules.values()):  # modules hold it by name
        if getattr(module, "__dict__", {}).get("track_progress_rich") is track_progress:
            module.track_progress_rich = tracked  # type: ignore[attr-defined]


@contextmanager
def _texts_as_written() -> Iterator[None]:
    """Patch of pandas, by which the kit reads its files: it makes 2.0 of an option `2` if another question has fewer options,
    and drops options such as `n/a`. (The kit's benchmarks are read as the kit does.)"""
    import pandas

    read_csv = pandas.read_csv
    texts = dict.fromkeys([*string.ascii_uppercase, "question", "answer", "prediction", "category"], str)
    pandas.read_csv = partial(read_csv, dtype=texts, keep_default_na=False, na_values=[""])
    try:
        yield
    finally:
        pandas.read_csv = read_csv


def _dataset(name: str, form: str, job: dict[str, Any]) -> Any:
    """Data set of ours from $LMUData, or the kit's benchmark of that name."""
    if form == "stock":
        return _benchmark(name, job["light"], job["md5"])
    from vlmeval.dataset.image_mcq import ImageMCQDataset
    from vlmeval.dataset.image_vqa import CustomVQADataset
    from vlmeval.dataset.image_yorn import ImageYORNDataset
    from vlmeval.smp import LMUDataRoot, load

    class OwnDataset({"mcq": ImageMCQDataset, "yes_no": ImageYORNDataset, "vqa": CustomVQADataset}[form]):  # type: ignore[misc]
        DATASET_URL: dict[str, str] = {}  # noqa: RUF012
        DATASET_MD5: dict[str, str] = {}  # noqa: RUF012

        def load_data(self, dataset: str) -> Any:
            """Whole file; above 1 GB the kit moves the images out of it, with code that the light kit lacks."""
            return load(f"{LMUDataRoot()}/{dataset}.tsv")

    return OwnDataset(name)


def _benchmark(name: str, light: bool, md5: dict[str, str]) -> Any:
    """Instance of the kit's benchmark class, which downloads its file unless $LMUData has one with the expected MD5.

    `md5`: hashes of user files, which become the expected ones; entries equal to the kit's own are removed from it.
    """
    if light:
        modules = [importlib.import_module(f"vlmeval.dataset.{module}") for module in LIGHT_MODULES]
        classes = [
            benchmark for module in modules for benchmark in vars(module).values() if hasattr(benchmark, "supported_datasets")
        ]
    else:
        from vlmeval import dataset

        classes = dataset.DATASET_CLASSES
    matching = (c for c in classes if name in c.supported_datasets() and {"DATASET_URL", "supported_datasets"} & set(vars(c)))
    benchmark = next(matching, None)
    if benchmark is None:
        more = "; the full one has more: `make vlmeval-env`" if light else ""
        _refuse(f"this VLMEvalKit has no benchmark {name!r} of questions about images{more}")
    if benchmark.MODALITY != "IMAGE":
        _refuse(f"{name} asks about {benchmark.MODALITY.lower()}s, and students see images")
    if name in md5:
        if benchmark.DATASET_MD5.get(name) == md5[name]:
            del md5[name]
        else:
            benchmark.DATASET_MD5[name] = md5[name]
    return benchmark(name)


def _refuse(reason: str) -> NoReturn:
    print(reason, file=sys.stderr, flush=True)
    os._exit(EXIT_UNSUPPORTED)  # skips the kit's output on exit


def _student(job: dict[str, Any]) -> Any:
    from vlmeval.smp import LMUDataRoot
    from vlmeval.vlm.base import BaseModel

    endpoint, journal = Endpoint(**job["endpoint"]), Journal(Path(job["journal"]))

    class Student(BaseModel):  # type: ignore[misc]
        """Client of the served student: prompts as in training for a `plain` job, else the kit's."""

        is_api = True  # enables the kit's thread pool
        INTERLEAVE = False

        def __init__(self) -> None:
            super().__init__()
            self.failed: dict[str, str] = {}
            self.overlong: list[str] = []
            self.gone: OSError | None = None

        def use_custom_prompt(self, dataset: str) -> bool:
            return bool(job["plain"])

        def build_prompt(self, line: Any, dataset: str) -> list[dict[str, str]]:
            """Message with the images' original bytes (the kit's `dump_image` would re-encode them), each at its <image>, or
            first."""
            images = line["image"] if isinstance(line["image"], list) else [line["image"]]
            image_parts = []
            for number, image in enumerate(images):
                path = Path(LMUDataRoot()) / "images" / dataset / f"{line['index']}{f'_{number}' * (len(images) > 1)}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(image))
                image_parts.append({"type": "image", "value": str(path)})
            text_parts = [{"type": "text", "value": text} for text in str(line["question"]).split("<image>")]
            if len(text_parts) != len(image_parts) + 1:
                return [*image_parts, {"type": "text", "value": str(line["question"])}]
            interleaved = [part for pair in zip(text_parts, [*image_parts, text_parts[-1]], strict=True) for part in pair][:-1]
            return [part for part in interleaved if part["value"]]

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            if self.gone:
                raise self.gone  # the server is gone: fail the remaining questions at once
            paths = [part["value"] for part in message if part["type"] == "image"]
            parts = [Path(part["value"]).read_bytes() if part["type"] == "image" else part["value"] for part in message]
            if len(paths) < 2 and not job["plain"]:  # text after the image
                parts = [*(Path(path).read_bytes() for path in paths), "\n".join(p for p in parts if isinstance(p, str))]
            if job["blank"]:
                parts = [blank(part) if isinstance(part, bytes) else part for part in parts]
            question_name = f"{dataset}/{Path(paths[0]).stem}" if paths else str(parts)  # image files are named by row index
            key = hashlib.sha256(b"\0".join(part if isinstance(part, bytes) else part.encode() for part in parts)).hexdigest()
            if key not in journal.answers:
                try:
                    journal.add({key: chat_completion(endpoint, parts, job["max_new_tokens"])})
                except RequestRejected as error:  # counted; the next run retries it
                    self.failed[question_name] = str(error)
                    return EMPTY_ANSWER
                except OSError as error:
                    self.gone = error
                    raise
            answer = journal.answers[key]
            if len(answer) > LONGEST:
                self.overlong.append(question_name)
                return EMPTY_ANSWER
            return answer or EMPTY_ANSWER

    return Student()


def blank(image: bytes) -> bytes:
    """Plain grey PNG of the same size, also used by `alignti controls`."""
    from PIL import Image

    file = io.BytesIO()
    with Image.open(io.BytesIO(image)) as original:
        Image.new("RGB", original.size, GREY).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
