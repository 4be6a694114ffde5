"""Model lookup by name: an arm, `teacher`, a checkpoint folder (LoRA adapters too), or a repository on the Hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from components.config.names import HUB_ID
from components.config.settings import Settings
from components.errors import InputError, ModelError, unknown
from components.evaluate.__main__ import model_of
from components.models.checkpoint_folder import as_model_error
from components.models.download import snapshot
from components.models.load import Loaded, check_images, load
from components.models.processor import load_processor
from components.models.template import Template
from components.records.paths import TEACHER_ARM

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class CheckpointRef:
    """Location of a checkpoint. `arm`: name of this project's arm or `teacher`, else None."""

    name: str
    path: Path
    arm: str | None


def find(name: str, settings: Settings) -> CheckpointRef:
    """Checkpoint of that name. Raises InputError for an unknown name, ModelError or TryAgainError for a failed download."""
    if name in (TEACHER_ARM, *settings.study.arms):
        return CheckpointRef(name, model_of(name), name)
    if Path(name).is_dir():
        return CheckpointRef(Path(name).resolve().name, Path(name), None)
    if match := HUB_ID.fullmatch(name):
        return CheckpointRef(name, snapshot(match["id"], match["revision"]), None)
    raise unknown("model", name, [TEACHER_ARM, *settings.study.arms])


def open_model(path: Path, device: torch.device | str) -> Loaded:
    """Open a checkpoint folder as `load`; peft adapters are merged into their base model.

    Raises InputError for adapters without peft; ModelError as `load`, and if model and processor differ in image tokens.
    """
    loaded = _load_merged(path, device) if (path / ADAPTER).is_file() else load(path, device)
    check_images(loaded)
    return loaded


def template_of(checkpoint: CheckpointRef, loaded: Loaded, settings: Settings) -> Template:
    """Chat template: the project's for its own arms and for checkpoints without a usable one, else the checkpoint's."""
    own, project = Template("", style="processor"), Template.from_settings(settings.models.template)
    if checkpoint.arm is not None:
        return project
    try:
        own.of(loaded.processor)
    except ModelError:  # it has none, or, as LLaVA-1.5, one without an end of answers; the advice is to set the project's
        return project
    return own


def _load_merged(path: Path, device: torch.device | str) -> Loaded:
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError(
            f"{path} holds LoRA adapters, and peft is not installed: pip install -c constraints.txt -e '.[lora]'"
        ) from None
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelError(f"{path}: no adapter_model.safetensors; pickled adapters are not read, since that can run code")
    base = base_folder(path)
    loaded = load(base, device)
    with as_model_error(f"{path}: adapters that do not fit {base}"):
        adapted: Any = PeftModel.from_pretrained(loaded.model, str(path))
        if unread := _unread_tensors(adapted, path / "adapter_model.safetensors"):
            raise ValueError(f"{len(unread)} tensors belong to no part of it, such as {unread[0]}")
        model = adapted.merge_and_unload(safe_merge=True)
    has_processor = any((path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
    return Loaded(model.eval(), load_processor(path) if has_processor else loaded.processor)


def _unread_tensors(adapted: Any, file: Path) -> list[str]:
    """Names of the tensors of `file` that the adapted model does not hold: peft passes over names that it does not know."""
    stored = load_file(file)
    shapes = {tensor.shape for tensor in stored.values()}
    held = {_digest(tensor) for tensor in adapted.state_dict().values() if tensor.shape in shapes}
    return [name for name, tensor in stored.items() if _digest(tensor) not in held]


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.float().cpu().numpy().tobytes()).digest()


def base_folder(path: Path) -> Path:
    """Checkpoint folder of the adapters' base model, local or from the Hub. Raises ModelError if `path` names none."""
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
