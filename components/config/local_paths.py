"""Local data, images and checkpoints in the settings, and the config of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from components.config.models import Checkpoint, Cut, EmbeddedFamily, Parts, PretrainedFamily
from components.config.settings import Settings


def missing_paths(settings: Settings) -> list[str]:
    """Missing local data, images and checkpoints of the settings, as `key: path`."""
    return [f"{key}: {path}" for key, path in named_paths(settings) if not exists(path)]


def named_paths(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Key and path of the user's local data and checkpoints."""
    data, models = settings.data, settings.models.members
    if data.source == "llava" and data.llava is not None:
        yield from (("data.llava.annotations", data.llava.annotations), ("data.llava.images", data.llava.images))
    if data.source == "mixture" and data.mixture is not None:
        for name, source in data.mixture.sources.items():
            if not source.files.startswith("hf://"):
                yield f"data.mixture.sources.{name}.files", Path(source.files)
            if source.images is not None:
                yield f"data.mixture.sources.{name}.images", source.images
        yield from (("data.mixture.evaluation_images", folder) for folder in data.mixture.evaluation_images)
    if isinstance(models, PretrainedFamily):
        for name, model in (*models.teachers.items(), *models.students.items()):
            parts = {"": model} if isinstance(model, Checkpoint) else {}
            if isinstance(model, Parts):
                parts = {".tower": model.tower, ".language_model": model.language_model}
            yield from (
                (f"models.pretrained: {name}{part}", Path(c.source).expanduser()) for part, c in parts.items() if not c.revision
            )


def exists(path: Path) -> bool:
    """Whether the path exists, or for a pattern such as `x/*.tar` one such file."""
    return path.exists() or any(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def layer_counts(models: EmbeddedFamily | PretrainedFamily, role: Literal["teachers", "students"]) -> dict[str, int | None]:
    """Number of decoder layers of each teacher or student; None if neither params/ nor a local checkpoint gives it."""
    if isinstance(models, EmbeddedFamily):
        return {name: shape.layers for name, shape in getattr(models, role).items()}
    counts = {name: _text_config(model).get("num_hidden_layers") for name, model in getattr(models, role).items()}
    return {name: count if isinstance(count, int) else None for name, count in counts.items()}


def soft_capped_models(models: EmbeddedFamily | PretrainedFamily) -> list[str]:
    """Models on this machine whose logits are soft-capped (Gemma 2)."""
    if isinstance(models, EmbeddedFamily):
        return []
    members = {**models.teachers, **models.students}
    return [name for name, model in members.items() if _text_config(model).get("final_logit_softcapping") is not None]


def _text_config(model: Checkpoint | Parts | Cut) -> dict[str, Any]:
    """Language model's part of config.json; empty if the file is missing or broken, which `missing_paths` or the stage that
    loads it reports."""
    checkpoint = model.language_model if isinstance(model, Parts) else model
    if not isinstance(checkpoint, Checkpoint):
        return {}
    try:
        config = json.loads((_folder(checkpoint) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    text_config = config.get("text_config", config) if isinstance(config, dict) else {}
    return text_config if isinstance(text_config, dict) else {}


def downloaded(checkpoint: Checkpoint, root: Path = Path()) -> Path | None:
    """Folder of a checkpoint on this machine; None without config.json and weights."""
    folder = _folder(checkpoint, root)
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def _folder(checkpoint: Checkpoint, root: Path = Path()) -> Path:
    if checkpoint.revision is None:
        return root / Path(checkpoint.source).expanduser()
    return hub_cache() / f"models--{checkpoint.source.replace('/', '--')}" / "snapshots" / checkpoint.revision


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
