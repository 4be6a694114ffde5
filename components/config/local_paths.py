"""Data, images and local checkpoints that the settings name, and what a checkpoint's config says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from components.config.models import Checkpoint, EmbeddedFamily, Parts, PretrainedFamily
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
            yield from ((f"models.pretrained: {name}{part}", Path(c.source)) for part, c in parts.items() if not c.revision)


def _is_here(path: Path) -> bool:
    """`x/*.tar` is, if one such file is."""
    return path.exists() or ("*" in path.name and any(path.parent.glob(path.name)))


def layers_of_teachers(models: EmbeddedFamily | PretrainedFamily) -> list[int | None]:
    """Layers of each teacher's language model; None where neither params/ nor a folder here say how many."""
    if isinstance(models, EmbeddedFamily):
        return [shape.layers for shape in models.teachers.values()]
    return [_layers(model.language_model if isinstance(model, Parts) else model) for model in models.teachers.values()]


def _layers(checkpoint: Checkpoint) -> int | None:
    try:
        config = json.loads((Path(checkpoint.source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of the hub, or missing, or broken: `not_here` and the stage that loads it say so
        return None
    found = config.get("text_config", config).get("num_hidden_layers") if isinstance(config, dict) else None
    return found if isinstance(found, int) else None
