"""`alignti init`: generates a recipe from own rows, images and a pair of models.

Writes params/recipes/NAME.yaml, with a comment on every choice, on top of the base recipe of released checkpoints
(`_full-size`). Choices here depend on the data and the models; the rest, such as the learning rate, is inherited.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from components.config import recipes
from components.config.load import load_settings
from components.config.merge import text_of
from components.config.models import PretrainedFamily, Template
from components.config.settings import Settings
from components.errors import DataError, ModelError
from components.io import write_text
from components.own_data.check import CONNECTED, CheckResult, accept_rows, check_intervals, report, try_data
from components.own_data.options import InitOptions
from components.records.paths import SPLITS
from components.report.markdown import counted

MIN_SHARE, MAX_SHARE = 0.05, 0.2  # of the val and test shares, which aim at EVALUATED_IMAGES each
EVALUATED_IMAGES = 50
BATCH_SIZES = (128, 64, 32, 16, 8, 4)  # candidates; the largest that leaves MIN_STEPS an epoch is chosen
MIN_STEPS = 50
MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Choice:
    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.value}  ({self.reason})"


def init(options: InitOptions) -> tuple[list[str], list[Choice]]:
    """Check data and models and write the recipe; returns the report's lines and the choices. params/*.yaml stay as they are.

    Raises DataError or ModelError for unusable data or models, SettingsError if the recipe does not merge with params/.
    """
    pair = Pair.from_options(options)
    settings, result = _check_data(options, pair)
    report_lines = list(report(result, settings, pair.folders, []))
    if pair.sizes["teacher"] <= pair.sizes["student"]:
        report_lines.append("warning: the teacher's language model is no larger than the student's: are the two swapped?")
    accept_rows(result, settings)
    choices = list(_choices(result, settings, pair))
    write_text(options.recipe, _recipe_text(options, choices, settings, pair))
    try:
        recipes.merged(options.name)
    except Exception:
        options.recipe.unlink()
        raise
    return report_lines, choices


# --- the models -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    members: PretrainedFamily
    folders: dict[str, Path]
    template: Choice
    context: int  # smaller context length of the two, in tokens
    sizes: dict[str, int]  # layers x width^2 of the language models

    @classmethod
    def from_options(cls, options: InitOptions) -> Pair:
        """Pair from the options. Raises ModelError if it cannot be distilled, judged from all files but the weights."""
        from components.models.checkpoint_folder import config_of
        from components.models.download import locate
        from components.models.load import Loaded, check_kind, check_processors, check_same_template, grids
        from components.models.processor import load_processor
        from components.models.tinyllava import is_tinyllava

        checkpoints = {role: options.checkpoint(role) for role in ("student", "teacher")}
        folders = {role: locate(checkpoint) for role, checkpoint in checkpoints.items()}
        loaded, contexts, sizes = {}, [], {}
        for role, folder in folders.items():
            if is_tinyllava(folder):
                raise ModelError(
                    f"{folder} is a TinyLLaVA checkpoint, of which `obtain_models` makes a stock folder: name it in"
                    f" params/models.yaml, `dvc repro obtain_models`, then give `alignti init` what is under artifacts/models/"
                )
            check_kind(folder)
            config = config_of(folder).get_text_config()
            head = SimpleNamespace(weight=SimpleNamespace(shape=(config.vocab_size,)))
            model = SimpleNamespace(name_or_path=str(folder), get_output_embeddings=lambda head=head: head)
            loaded[role] = Loaded(model, load_processor(folder))
            sizes[role] = config.num_hidden_layers * config.hidden_size**2
            contexts.append(int(getattr(config, "max_position_embeddings", None) or sys.maxsize))
        check_processors(loaded["teacher"], loaded["student"], grids(loaded["teacher"], loaded["student"]) is not None)
        try:
            check_same_template(loaded["teacher"], loaded["student"], Template(style="processor", system=""))
            template = Choice("models.template.style", "processor", "both checkpoints have the same chat template of their own")
        except ModelError as error:
            template = Choice("models.template.style", "vicuna", f"their own do not serve: {error}")
        members = PretrainedFamily(teachers={"teacher": checkpoints["teacher"]}, students={"student": checkpoints["student"]})
        return cls(members, folders, template, min(contexts), sizes)


# --- the data ---------------------------------------------------------------------------------------------------------------


def _check_data(options: InitOptions, pair: Pair) -> tuple[Settings, CheckResult]:
    """Settings and trial of all rows with both models; small data get larger val and test shares."""
    shipped = load_settings()
    models = shipped.models.model_copy(
        update={
            "family": "pretrained",
            "pretrained": pair.members,
            "template": Template(style=pair.template.value, system=""),
            "max_length": pair.context,
        }
    )

    def check_with(share: float) -> tuple[Settings, CheckResult]:
        data = options.settings(shipped.data, share)
        evaluate = shipped.evaluate.model_copy(update={"max_new_tokens": MAX_NEW_TOKENS})
        irs = shipped.irs.model_copy(update={"instructions_per_image": 2})
        settings = shipped.model_copy(update={"data": data, "models": models, "irs": irs, "evaluate": evaluate})
        return settings, try_data(settings, pair.folders.values(), shipped.runtime.workers)

    settings, result = check_with(MIN_SHARE)
    share = min(MAX_SHARE, max(MIN_SHARE, round(EVALUATED_IMAGES / max(1, result.tally.images.total()), 2)))
    return (settings, result) if share == MIN_SHARE else check_with(share)


def _choices(result: CheckResult, settings: Settings, pair: Pair) -> Iterator[Choice]:
    """Choices by data and models. Raises DataError if the images are too few to split."""
    tally, llava = result.tally, settings.data.llava
    assert llava is not None
    if empty := [split for split in SPLITS if not tally.usable[split]]:
        raise DataError(
            f"{counted(tally.images.total(), 'image')}, and none usable for {' and '.join(empty)}: give more ({CONNECTED})"
        )
    check_intervals(result, settings)
    images = ", ".join(f"{tally.images[split]:,} {split}" for split in SPLITS)
    yield Choice("data.llava.val", llava.val, f"and as much for test: {images} images")
    yield pair.template
    longest = max(tally.tokens)
    yield Choice(
        "models.max_length",
        min(pair.context, 32 * math.ceil(longest / 32)),
        f"the longest sample has {longest:,} tokens, visual ones among them; the models read {pair.context:,}",
    )
    yield from _irs(result)
    train = tally.usable["train"]
    batch = next((size for size in BATCH_SIZES if train >= MIN_STEPS * size), BATCH_SIZES[-1])
    steps = math.ceil(train / batch)
    yield Choice(
        "distill.batch_size",
        batch,
        f"the largest of {', '.join(map(str, BATCH_SIZES))} that leaves {MIN_STEPS} steps, or the last",
    )
    yield Choice("distill.steps", steps, f"one epoch of {train:,} samples")
    yield Choice("distill.log_every", max(1, min(20, steps // 10)), "ten times a training, or every 20 steps")
    yield Choice("distill.checkpoint_every", max(1, min(500, steps // 4)), "four times a training, or every 500 steps")
    longest_answer = max(tally.first_answers())
    yield Choice(
        "evaluate.max_new_tokens",
        min(longest_answer, MAX_NEW_TOKENS),
        f"the longest first answer has {longest_answer:,} tokens, its end among them",
    )
    yield from _machine(batch)


def _irs(result: CheckResult) -> Iterator[Choice]:
    """IRS settings, by boxes and number of questions per image."""
    tally = result.tally
    per_image = next(
        (n for n in (4, 3, 2) if min(tally.images_with_questions(split, n) for split in ("train", "val")) >= 2), None
    )
    if per_image is None:
        yield Choice("irs.instructions_per_image", 2, "no two images of train and two of val have two questions each: no IRS")
        yield Choice("distill.iva.weighting", "uniform", "without IRS all visual tokens weigh the same")
        return
    eligible = tally.images_with_questions("train", per_image)
    yield Choice(
        "irs.instructions_per_image", per_image, f"{eligible:,} images of train and 2 or more of val have so many questions"
    )
    yield Choice("irs.images", min(200, eligible), "all that have, up to 200")
    if result.boxes:
        yield Choice("irs.rule", "pointing", "some questions have boxes, so layers can be judged by where they look")
        yield Choice("irs.weighting", None, "whichever points best")
        yield Choice("irs.instruction_rows", None, "whichever point best")
        yield Choice("distill.iva.weighting", "searched", "by that rule")
    else:
        yield Choice("irs.rule", "irs", "no question has boxes; the paper's rule")


def _machine(batch: int) -> Iterator[Choice]:
    import torch

    gpus = torch.cuda.device_count()
    hardware = f"{gpus} GPU(s)" if gpus else "no GPU"
    yield Choice("distill.precision", "bf16" if gpus else "fp32", f"there is {hardware} here")
    devices = next(count for count in range(max(1, gpus), 0, -1) if batch % count == 0)
    yield Choice("runtime.devices", devices, f"there is {hardware} here, and a batch is shared out evenly")
    yield Choice("runtime.loaders", 4 if gpus else 0, f"there is {hardware} here")


# --- the recipe -------------------------------------------------------------------------------------------------------------


def _recipe_text(options: InitOptions, choices: list[Choice], settings: Settings, pair: Pair) -> str:
    llava = settings.data.llava
    assert llava is not None
    header = (
        f"Made by `alignti init` of {options.data}, {options.images}, {options.teacher} and {options.student}. Yours to change."
    )
    document: dict[str, Any] = {
        "about": {
            "run": f"alignti use {options.name} && dvc repro",
            "hardware": "the machine it was made on",
            "time": None,
            "result": "nothing measured yet",
            "seconds": None,
        },
        "like": "_full-size",
        "data": {"source": "llava", "llava": llava.model_dump(mode="json")},
        "models": {"pretrained": pair.members.model_dump()},
    }
    for choice in choices:
        *parents, key = choice.key.split(".")
        node = document
        for step in parents:
            node = node.setdefault(step, {})
        node[key] = choice.value
    comments = "".join(f"# {' '.join(str(comment).split())}\n" for comment in (header, *choices))
    return comments + text_of(document)
