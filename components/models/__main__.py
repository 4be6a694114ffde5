"""Stage `obtain_models`: every model that params/models.yaml names, built and trained here or obtained, with one record each.

python -m components.models      params/models.yaml, artifacts/dataset -> artifacts/models
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Literal

from components.artifacts import DATASET, MODELS, ModelIndex, ModelRecord
from components.errors import exit_from
from components.settings import Checkpoint, ModelsSettings, load_settings


def main() -> None:
    settings = load_settings()
    from transformers.utils.logging import disable_progress_bar

    from components.models import embedded, obtain
    from components.models.tiles import as_one_tile
    from components.runtime import prepare_torch
    from components.shards import Samples
    from components.tracking import stage_run

    disable_progress_bar()  # of writing one shard
    began = time.perf_counter()
    shutil.rmtree(MODELS, ignore_errors=True)
    models = settings.models
    varied = {"family": models.family, "models": models.members.model_dump(mode="json")}
    with stage_run("obtain_models", runtime=settings.runtime, params=varied) as run:
        if models.embedded is not None and models.family == "embedded":
            device = prepare_torch(settings.runtime, models.embedded.seed)
            samples = Samples(DATASET, "train")
            run.dataset("train", samples.manifest.digest)
            embedded.build(models, samples, MODELS, device, lambda name, loss, step: run.metrics({f"loss/{name}": loss}, step))
        elif models.pretrained is not None:
            for role, members in (("teachers", models.pretrained.teachers), ("students", models.pretrained.students)):
                for name, checkpoint in members.items():
                    obtain.obtain(checkpoint, MODELS / role / name)
            if not models.image_splitting:
                for folder in sorted(MODELS.glob("*/*")):
                    as_one_tile(folder)
        index = index_of(models, MODELS)
        index.write(MODELS / "index.json")
    sizes = "; ".join(
        f"{role} " + ", ".join(f"{name} {entry.parameters / 1e6:,.2f}M" for name, entry in sorted(entries.items()))
        for role, entries in (("teachers", index.teachers), ("students", index.students))
    )
    print(f"obtain_models: {sizes} parameters; in {time.perf_counter() - began:,.0f} s -> {MODELS / 'index.json'}")


def index_of(models: ModelsSettings, folder: Path) -> ModelIndex:
    """Records of the models that lie under `folder`. Raises ModelError if a processor cannot serve."""
    from components.models.collate import check_special_tokens, visual_tokens
    from components.models.folder import record
    from components.models.load import check_kind
    from components.models.processor import load_processor

    def of(role: Literal["teacher", "student"], name: str, member: object) -> ModelRecord:
        path = folder / f"{role}s" / name
        check_kind(path)
        processor = load_processor(path)
        check_special_tokens(processor)
        origin, revision = (member.source, member.revision) if isinstance(member, Checkpoint) else ("embedded", None)
        return record(path, role, origin, revision, visual_tokens(processor))

    return ModelIndex(
        teachers={name: of("teacher", name, member) for name, member in models.members.teachers.items()},
        students={name: of("student", name, member) for name, member in models.members.students.items()},
    )


if __name__ == "__main__":
    exit_from(main)
