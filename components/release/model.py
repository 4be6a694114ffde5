"""Model by the name that a user gives it: an arm, `teacher`, a folder (LoRA adapters too), or one on the Hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.config.settings import Settings
from components.errors import InputError, ModelError
from components.evaluate.__main__ import model_of
from components.models.download import snapshot
from components.models.load import Loaded, check_images, load
from components.models.processor import load_processor
from components.models.template import Template
from components.records.paths import TEACHER_ARM

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?")
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Named:
    """A model that was found, not opened yet. `arm`: it is this project's own, by that name."""

    name: str
    path: Path
    arm: str | None


def find(name: str, settings: Settings) -> Named:
    """Raises InputError if nothing has this name, ModelError or TryAgainError if it is on the hub and does not come."""
    if name in (TEACHER_ARM, *settings.study.arms):
        return Named(name, model_of(name), name)
    if Path(name).is_dir():
        return Named(Path(name).resolve().name, Path(name), None)
    if match := HUB_ID.fullmatch(name):
        return Named(name, snapshot(match["id"], match["revision"]), None)
    raise InputError(
        f"there is no model {name!r}: it is no folder here, none of {', '.join([TEACHER_ARM, *settings.study.arms])}, and no"
        " ORG/NAME of the hub"
    )


def open_model(path: Path, device: torch.device | str) -> Loaded:
    """As `load`; adapters of peft are folded into the model that they were trained beside.

    Raises ModelError as `load`, and if the model finds another number of image tokens than its processor writes.
    """
    opened = _merged(path, device) if (path / ADAPTER).is_file() else load(path, device)
    check_images(opened)
    return opened


def template_of(named: Named, loaded: Loaded, settings: Settings) -> Template:
    """Chat template of the model: this project's for its own arms, else the checkpoint's, if it has one."""
    own = loaded.processor.chat_template or loaded.processor.tokenizer.chat_template
    if named.arm is not None or not own:
        return Template.asked(settings.models.template)
    return Template("", style="processor")


def _merged(path: Path, device: torch.device | str) -> Loaded:
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError(
            f"{path} holds LoRA adapters, and peft is not installed: pip install -c constraints.txt -e '.[lora]'"
        ) from None
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelError(f"{path}: no adapter_model.safetensors; pickled adapters are not read, since that can run code")
    base = base_of(path)
    loaded = load(base, device)
    try:
        model: Any = PeftModel.from_pretrained(loaded.model, str(path)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: adapters that do not fit {base}: {' '.join(str(error).split())[:200]}") from None
    own = any((path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
    return Loaded(model.eval(), load_processor(path) if own else loaded.processor)


def base_of(path: Path) -> Path:
    """The folder of the model that the adapters stand beside. Raises ModelError if it is not here."""
    try:
        config = json.loads((path / ADAPTER).read_text(encoding="utf-8"))
        name, revision = config["base_model_name_or_path"], config.get("revision")
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{path / ADAPTER}: does not say which model these adapters belong to") from None
    if name and Path(name).is_dir():
        return Path(name)
    if name and HUB_ID.fullmatch(name):
        return snapshot(name, revision)
    raise ModelError(f"{path / ADAPTER}: its base_model_name_or_path {name!r} is no folder here and no ORG/NAME of the hub")
