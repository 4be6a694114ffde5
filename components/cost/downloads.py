"""Missing downloads: models and data that a run reads and this machine lacks, found offline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from components.config.local_paths import downloaded, exists, hub_cache
from components.config.models import Checkpoint, Parts
from components.config.settings import Settings
from components.cost import shapes

STUDENT_PATH = re.compile(r"artifacts/students/([a-z0-9_-]+)/model")

# Published sizes of data sets: rows and, if known, bytes to download.
ROWS = {
    "share-captioner_coco_lcs_sam_1246k_1107.json": 1_246_000,
    "MobileVLM_V2_FT_Mix2M.json": 2_428_000,
    "blip_laion_cc_sbu_558k.json": 558_000,
    "llava_v1_5_mix665k.json": 665_000,
}
DATA_BYTES = {"data/llava/pretrain": 27_356_108_382, "data/mix2m/MobileVLM_V2_FT_Mix2M.json": 1.4e9}


@dataclass(frozen=True)
class Missing:
    """Model or data set that a run reads and this machine lacks."""

    name: str
    size: float | None  # bytes, where known
    licence: str
    instructions: str


def missing(settings: Settings, root: Path = Path()) -> list[Missing]:
    """Models and data of the run that this machine lacks, without network access."""
    return [*_missing_models(settings, root), *_missing_data(settings, root)]


def _missing_models(settings: Settings, root: Path) -> Iterator[Missing]:
    members = settings.models.pretrained
    if settings.models.family != "pretrained" or members is None:
        return
    entries = (*members.teachers.values(), *members.students.values())
    parts = (
        part for entry in entries for part in ((entry.tower, entry.language_model) if isinstance(entry, Parts) else (entry,))
    )
    for checkpoint in dict.fromkeys(part for part in parts if isinstance(part, Checkpoint)):
        if downloaded(checkpoint, root) is not None:
            continue
        source = checkpoint.source
        if checkpoint.revision is None:
            yield Missing(source, None, "yours", "put it there; an earlier run makes it if it lies under artifacts/students")
            continue
        name = f"{source}@{checkpoint.revision[:8]}"
        licence = f"{shapes.LICENCES[source]}; not gated" if source in shapes.LICENCES else "see its page"
        yield Missing(name, shapes.download_bytes(source), licence, "obtain_models fetches it from the hub")


def _missing_data(settings: Settings, root: Path) -> Iterator[Missing]:
    data = settings.data
    if data.source == "llava" and data.llava is not None:
        for path in (data.llava.annotations, data.llava.images):
            if not _exists(str(path), root):
                yield Missing(str(path), None, "yours", "put it there (docs/data.md)")
    if data.source != "mixture" or data.mixture is None:
        return
    for source in data.mixture.sources.values():
        if not _exists(source.files, root):
            name = re.sub("@([0-9a-f]{8})[0-9a-f]{32}", r"@\1", source.files.removeprefix("hf://datasets/"))
            rows = ROWS.get(source.files.rpartition("/")[2])
            row_count = f", {rows:,} rows" if rows else ""
            on_hub = source.files.startswith("hf://")
            instructions = "prepare fetches it from the hub" if on_hub else "put it there (params/mixtures/)"
            yield Missing(name + row_count, DATA_BYTES.get(source.files), source.licence, instructions)
        if (images := source.images) is not None and not _exists(str(images), root):
            instructions = "put them there (params/mixtures/)"
            yield Missing(f"{images} (images)", DATA_BYTES.get(str(images)), source.licence, instructions)


def _exists(pattern: str, root: Path) -> bool:
    """Whether a file, a non-empty folder, a match of a pattern or a file of the hub's cache exists."""
    if hub := re.fullmatch(r"hf://datasets/([^/]+)/([^@]+)@([0-9a-f]{40})/(.+)", pattern):
        org, name, commit, file = hub.groups()
        return any((hub_cache() / f"datasets--{org}--{name}" / "snapshots" / commit).glob(file))
    path = root / pattern
    return any(path.iterdir()) if path.is_dir() else exists(path)
