"""Data, images and local checkpoints that the settings name, and what a checkpoint's config says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.config.models import Checkpoint, Cut, EmbeddedFamily, Parts, PretrainedFamily
from components.config.settings import Settings


def not_here(settings: Settings) -> list[str]:
    """What the user's own settings name and this folder lacks: data, images, local checkpoints; `key: path`."""
    return [f"{key}: {path}" for key, path in named_paths(settings) if not _is_here(path)]


def named_paths(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Key and path of the user's own data and local checkpoints."""
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


def _is_here(path: Path) -> bool:
    """`x/*.tar` is, if one such file is."""
    return path.exists() or ("*" in path.name and any(path.parent.glob(path.name)))


def layers_of_teachers(models: EmbeddedFamily | PretrainedFamily) -> list[int | None]:
    """Layers of each teacher's language model; None where neither params/ nor a checkpoint on this machine say how many."""
    if isinstance(models, EmbeddedFamily):
        return [shape.layers for shape in models.teachers.values()]
    found = (_text_config(model).get("num_hidden_layers") for model in models.teachers.values())
    return [layers if isinstance(layers, int) else None for layers in found]


def soft_capped(models: EmbeddedFamily | PretrainedFamily) -> list[str]:
    """Models on this machine whose logits are soft-capped (Gemma 2)."""
    if isinstance(models, EmbeddedFamily):
        return []
    members = {**models.teachers, **models.students}
    return [name for name, model in members.items() if _text_config(model).get("final_logit_softcapping") is not None]


def _text_config(model: Checkpoint | Parts | Cut) -> dict[str, Any]:
    """What config.json says of the language model; nothing where it is not on this machine, or broken, which is told
    elsewhere: by `not_here`, or by the stage that loads it."""
    checkpoint = model.language_model if isinstance(model, Parts) else model
    if not isinstance(checkpoint, Checkpoint):
        return {}
    try:
        config = json.loads((_folder(checkpoint) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = config.get("text_config", config) if isinstance(config, dict) else {}
    return found if isinstance(found, dict) else {}


def downloaded(checkpoint: Checkpoint, root: Path = Path()) -> Path | None:
    """The folder of a checkpoint that is on this machine."""
    folder = _folder(checkpoint, root)
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def _folder(checkpoint: Checkpoint, root: Path = Path()) -> Path:
    if checkpoint.revision is None:
        return root / Path(checkpoint.source).expanduser()
    return hub_cache() / f"models--{checkpoint.source.replace('/', '--')}" / "snapshots" / checkpoint.revision


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
