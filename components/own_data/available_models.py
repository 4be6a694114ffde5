"""Models of `params/models.yaml` that are available locally, for `alignti check --data` and `alignti preview`."""

from __future__ import annotations

from pathlib import Path

from components.config.models import Checkpoint, ModelsSettings
from components.models.__main__ import origin_of
from components.records.models import ModelIndex
from components.records.paths import MODELS


def available_models(models: ModelsSettings) -> tuple[dict[str, Path], list[str]]:
    """Folders of available models (local checkpoints, or made by `obtain_models`), and names of the missing ones."""
    index = ModelIndex.read(MODELS / "index.json") if (MODELS / "index.json").is_file() else None
    folders, missing = {}, []
    for role in ("students", "teachers"):
        for name, member in getattr(models.members, role).items():
            record = getattr(index, role).get(name) if index else None
            if isinstance(member, Checkpoint) and member.revision is None and models.image_splitting:
                folders[name] = Path(member.source).expanduser()
            elif (
                record
                and (folder := Path(record.path)).is_dir()
                and (record.origin, record.revision) == origin_of(member, folder)
            ):
                folders[name] = folder
            else:
                missing.append(name)
    return folders, missing
