"""Bridge to lm-evaluation-harness: our image questions, language tasks, and any stock task by name."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tqdm import tqdm

from components.errors import DataError, InputError
from components.evaluate.journal import Journal
from components.evaluate.kits.scores import KitResult
from components.io import write_text

if TYPE_CHECKING:
    import torch

TASKS = Path("params/lm_eval")
QUESTIONS = "alignti_questions"
TEXT = ("alignti_language", "alignti_manners")


def installed() -> str:
    """Version of lm-eval. Raises InputError, with the install command, if there is none."""
    if find_spec("lm_eval") is None:
        raise InputError("lm-eval is not installed here: `make kits`")
    return version("lm_eval")


def evaluate(
    model: Path,
    device: torch.device,
    tasks: Sequence[str],
    stock: Sequence[str],
    batch_size: int,
    new_tokens: int,
    journal: Path,
    title: str = "lm-eval",
    system: str = "",
) -> KitResult:
    """Score the complete checkpoint folder `model` with the installed lm-eval; figures are named `task/metric`.

    Args:
        tasks: tasks of params/lm_eval/; no network is needed.
        stock: the kit's own tasks: NAME, which downloads its data, or NAME=FOLDER, a local copy of the hub's data set.
        new_tokens: maximum answer length.
        journal: earlier answers of this model with these settings; new ones are appended.

    Raises:
        InputError: no such stock task.
        DataError: a data folder is missing; a task failed.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # silences its verbose warnings
    manager = TaskManager(include_path=str(TASKS.resolve()), include_defaults=bool(stock), metadata={"model": str(model)})
    folders = {name: Path(folder) for name, _, folder in (task.partition("=") for task in stock) if folder}
    names = [task.partition("=")[0] for task in stock]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    missing = [folder for folder in folders.values() if not folder.is_dir()]
    if missing:
        raise DataError(f"{missing[0]}: no such folder")
    local_tasks = [_with_local_data(name, manager, folder, journal.parent) for name, folder in folders.items()]
    student = _student(model, device, batch_size, journal, title)
    try:
        results = simple_evaluate(
            model=student,
            tasks=[*tasks, *(name for name in names if name not in folders), *local_tasks],
            task_manager=manager,
            apply_chat_template=True,
            system_instruction=system or None,
            gen_kwargs={"max_gen_toks": new_tokens} if QUESTIONS in tasks else None,
            bootstrap_iters=0,
            log_samples=True,
            cache_requests=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"lm-eval on {model}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    logged = results["samples"].get(QUESTIONS, [])
    figures = {
        f"{task}{f' (data: {folders[task]})' if task in folders else ''}/{name.removesuffix(',none')}": float(value)
        for task, figures in results["results"].items()
        if task != QUESTIONS
        for name, value in figures.items()
        if isinstance(value, (int, float)) and "stderr" not in name and "," in name
    }
    return KitResult(
        answers={entry["doc"]["row"]: str(entry["resps"][0][0]).strip() for entry in logged},
        verdicts={entry["doc"]["row"]: entry["exact_match"] == 1 for entry in logged},
        figures=figures,
    )


def _with_local_data(name: str, manager: Any, data: Path, scratch: Path) -> str:
    """Task file that includes the kit's own and overrides its data set's path."""
    file = scratch / "tasks" / f"{name}.yaml"
    config = {"include": str(manager.task_index[name].yaml_path), "task": name, "dataset_path": str(data.resolve())}
    write_text(file, yaml.safe_dump(config))
    return str(file)


def _student(model: Path, device: torch.device, batch_size: int, journal: Path, title: str) -> Any:
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from transformers import GenerationConfig

    class Student(HFMultimodalLM):  # type: ignore[misc]
        """lm-eval's image-text model with a journal. (The kit's `use_cache` returns one answer for equal questions
        about different images.)"""

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            answer_journal = Journal(journal)
            keys = [_key(request.args) for request in requests]
            order = sorted(range(len(requests)), key=lambda index: len(requests[index].args[0]), reverse=True)
            with tqdm(total=len(order), desc=title, unit="question") as bar:
                for start in range(0, len(order), batch_size):
                    batch = order[start : start + batch_size]
                    if not all(keys[index] in answer_journal.answers for index in batch):
                        texts = super().generate_until([requests[index] for index in batch], disable_tqdm=True)
                        answer_journal.add({keys[index]: text for index, text in zip(batch, texts, strict=True)})
                    bar.update(len(batch))
            return [answer_journal.answers[key] for key in keys]

    student = Student(
        pretrained=str(model),
        dtype="float32",
        device=str(device),
        batch_size=batch_size,
        convert_img_format=True,
        trust_remote_code=False,
    )
    tokenizer = student.tokenizer
    student.model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return student


def _key(arguments: tuple[Any, ...]) -> str:
    """Digest of one request: prompt, settings and the pixels of its images."""
    prompt, settings, *rest = arguments
    hasher = hashlib.sha256(json.dumps([prompt, settings], sort_keys=True, default=str).encode())
    for image in rest[0]["visual"] if rest else ():
        hasher.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return hasher.hexdigest()
