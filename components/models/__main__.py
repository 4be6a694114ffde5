"""Stage `obtain_models`: builds, trains or downloads every model of params/models.yaml, with one index record each.

python -m components.models      params/models.yaml, artifacts/dataset -> artifacts/models
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, Literal

from components.config.load import load_settings
from components.config.models import Checkpoint, Cut, ModelsSettings, Parts
from components.process import exit_from
from components.records.models import ModelIndex, ModelRecord
from components.records.paths import DATASET, MODELS


def main() -> None:
    settings = load_settings()
    from transformers.utils.logging import disable_progress_bar

    from components.dataset.shards import Samples
    from components.digits import embedded_family
    from components.models.image_splitting import disable_image_splitting
    from components.tracking.stage_run import stage_run

    disable_progress_bar()  # per written shard
    started = time.perf_counter()
    shutil.rmtree(MODELS, ignore_errors=True)
    models = settings.models
    tracked_params = {"family": models.family, "models": models.members.model_dump(mode="json")}
    with stage_run("obtain_models", runtime=settings.runtime, params=tracked_params) as run:
        if models.embedded is not None and models.family == "embedded":
            samples = Samples(DATASET, "train")
            run.dataset("train", samples.manifest.digest)
            embedded_family.build(
                models, samples, MODELS, settings.runtime, lambda name, loss, step: run.metrics({f"loss/{name}": loss}, step)
            )
        elif models.pretrained is not None:
            check_processors(models)
            for role, members in (("teachers", models.pretrained.teachers), ("students", models.pretrained.students)):
                for name, member in members.items():
                    obtain_member(member, MODELS / role / name, models.template.system)
            if not models.image_splitting:
                for folder in sorted(MODELS.glob("*/*")):
                    disable_image_splitting(folder)
        index = build_index(models, MODELS)
        index.write(MODELS / "index.json")
    sizes = "; ".join(
        f"{role} " + ", ".join(f"{name} {entry.parameters / 1e6:,.2f}M" for name, entry in sorted(entries.items()))
        for role, entries in (("teachers", index.teachers), ("students", index.students))
        if entries
    )
    print(f"obtain_models: {sizes} parameters; in {time.perf_counter() - started:,.0f} s -> {MODELS / 'index.json'}")


def check_processors(models: ModelsSettings) -> None:
    """Open the processor of every checkpoint before any weights are downloaded. Raises as `locate` and `open_processor` do."""
    from components.models.download import locate
    from components.models.tinyllava import is_tinyllava

    for member in (*models.members.teachers.values(), *models.members.students.values()):
        if isinstance(member, Checkpoint) and not is_tinyllava(folder := locate(member, weights=False)):
            open_processor(folder, models)


def open_processor(folder: Path, models: ModelsSettings) -> Any:
    """Processor of a folder. Raises ModelError if the model's family, the processor or its template is unusable."""
    from components.models.collate import check_special_tokens
    from components.models.load import check_kind
    from components.models.processor import load_processor
    from components.models.template import Template

    check_kind(folder)
    processor = load_processor(folder)
    check_special_tokens(processor)
    Template.from_settings(models.template).of(processor)
    return processor


def obtain_member(member: Checkpoint | Parts | Cut, target: Path, system: str) -> Path:
    """Download, convert, assemble or prune one model of `family: pretrained`. Students may be pruned from teachers, so teachers
    come first. Raises as `locate`, `assemble`, `convert` and `cut` do.
    """
    from components.models.assemble import assemble
    from components.models.download import locate, obtain
    from components.models.prune import cut
    from components.models.tinyllava import convert, is_tinyllava

    if isinstance(member, Checkpoint):
        source = locate(member)
        return convert(source, system, target) if is_tinyllava(source) else obtain(member, target)
    if isinstance(member, Parts):
        return assemble(locate(member.tower), locate(member.language_model), member, system, target)
    return cut(target.parents[1] / "teachers" / member.teacher, member, target)


def origin_of(member: object, path: Path) -> tuple[str, str | None]:
    """Origin and commit of a member of `models.members` at `path`, for the index."""
    from components.models.prune import kept_layer_indices

    if isinstance(member, Checkpoint):
        return member.source, member.revision
    if isinstance(member, Parts):
        parts = (member.tower, member.language_model)
        return " + ".join(part.source + (f"@{part.revision}" if part.revision else "") for part in parts), None
    if isinstance(member, Cut):
        mlp = "" if member.mlp is None else f", {member.mlp} neurons of each MLP"
        return f"teacher {member.teacher}, layers {', '.join(map(str, kept_layer_indices(path, member)))}{mlp}", None
    return "embedded", None


def build_index(models: ModelsSettings, folder: Path) -> ModelIndex:
    """Index of the models under `folder`. Raises as `open_processor` does."""
    from components.models.checkpoint_folder import record
    from components.models.image_processor import visual_tokens

    def model_record(role: Literal["teacher", "student"], name: str, member: object) -> ModelRecord:
        path = folder / f"{role}s" / name
        return record(path, role, *origin_of(member, path), visual_tokens(open_processor(path, models)))

    return ModelIndex(
        teachers={name: model_record("teacher", name, member) for name, member in models.members.teachers.items()},
        students={name: model_record("student", name, member) for name, member in models.members.students.items()},
    )


if __name__ == "__main__":
    exit_from(main)
