"""Bridge to lm-evaluation-harness: our questions about images, language after distillation, any stock task by name."""

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
from components.evaluate.kits.scores import Measured
from components.io import write_text
from components.models.checkpoint_folder import weight_files

if TYPE_CHECKING:
    import torch

TASKS = Path("params/lm_eval")
QUESTIONS = "alignti_questions"
TEXT = ("alignti_language", "alignti_manners")


def installed() -> str:
    """The kit's version. Raises InputError, with the command that installs it."""
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
) -> Measured:
    """Score the checkpoint folder `model`; figures are named `task/metric`.

    Args:
        tasks: of params/lm_eval/; no network is needed.
        stock: NAME of the kit's own, which fetches its data; or NAME=FOLDER, its data set being there as the hub has it.
        new_tokens: where an answer that has not ended is cut.
        journal: of answers that were already given by this model to these settings.

    Raises:
        InputError: no lm-eval, or no such stock task.
        DataError: a task that failed; no such folder.
    """
    installed()
    weight_files(model)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it explains itself at length
    manager = TaskManager(include_path=str(TASKS.resolve()), include_defaults=bool(stock), metadata={"model": str(model)})
    folders = {name: Path(folder) for name, _, folder in (task.partition("=") for task in stock) if folder}
    names = [task.partition("=")[0] for task in stock]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    absent = [folder for folder in folders.values() if not folder.is_dir()]
    if absent:
        raise DataError(f"{absent[0]}: no such folder")
    moved = [_with_local_data(name, manager, folder, journal.parent) for name, folder in folders.items()]
    student = _student(model, device, batch_size, journal, title)
    try:
        found = simple_evaluate(
            model=student,
            tasks=[*tasks, *(name for name in names if name not in folders), *moved],
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
    logged = found["samples"].get(QUESTIONS, [])
    figures = {
        f"{task}{f' (data: {folders[task]})' if task in folders else ''}/{name.removesuffix(',none')}": float(value)
        for task, figures in found["results"].items()
        if task != QUESTIONS
        for name, value in figures.items()
        if isinstance(value, (int, float)) and "stderr" not in name and "," in name
    }
    return Measured(
        answers={entry["doc"]["row"]: str(entry["resps"][0][0]).strip() for entry in logged},
        verdicts={entry["doc"]["row"]: entry["exact_match"] == 1 for entry in logged},
        figures=figures,
    )


def _with_local_data(name: str, manager: Any, data: Path, scratch: Path) -> str:
    """A task file that is the kit's own in all but where its data set lies."""
    file = scratch / "tasks" / f"{name}.yaml"
    told = {"include": str(manager.task_index[name].yaml_path), "task": name, "dataset_path": str(data.resolve())}
    write_text(file, yaml.safe_dump(told))
    return str(file)


def _student(model: Path, device: torch.device, batch_size: int, journal: Path, title: str) -> Any:
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from transformers import GenerationConfig

    class Student(HFMultimodalLM):  # type: ignore[misc]
        """The kit's own model for images and text, with a journal. (Its `use_cache` takes equal questions about different
        images for the same request.)"""

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            known = Journal(journal)
            keys = [_key(request.args) for request in requests]
            order = sorted(range(len(requests)), key=lambda place: len(requests[place].args[0]), reverse=True)
            with tqdm(total=len(order), desc=title, unit="question") as bar:
                for start in range(0, len(order), batch_size):
                    these = order[start : start + batch_size]
                    if not all(keys[place] in known.known for place in these):
                        texts = super().generate_until([requests[place] for place in these], disable_tqdm=True)
                        known.add({keys[place]: text for place, text in zip(these, texts, strict=True)})
                    bar.update(len(these))
            return [known.known[key] for key in keys]

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
    found = hashlib.sha256(json.dumps([prompt, settings], sort_keys=True, default=str).encode())
    for image in rest[0]["visual"] if rest else ():
        found.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return found.hexdigest()
