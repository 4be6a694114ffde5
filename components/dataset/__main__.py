"""`python -m components.dataset`: the stage `prepare`. Reads params/data.yaml and data/, writes artifacts/dataset/."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from components.config.load import load_settings
from components.config.local_paths import named_paths
from components.config.settings import Settings
from components.dataset.shards import CAPTION, Samples
from components.process import exit_from
from components.records.dataset import Overlap
from components.records.paths import DATASET
from components.tracking.stage_run import stage_run

NO_SEARCH = "; fewer than two images of train have two questions: no layer can be searched (iva.weighting: uniform needs none)"


def main() -> None:
    settings = load_settings()
    from components.dataset.prepare import prepare, summary
    from components.dataset.source import quarantined

    for unseen in unseen_by_dvc(settings):
        print(f"prepare: {unseen}", file=sys.stderr)
    with stage_run("prepare", runtime=settings.runtime, params=settings.data.model_dump(mode="json")) as run:
        manifest = prepare(settings.data, workers=settings.runtime.workers)
        run.dataset("prepared", manifest.digest)
        run.metrics({"rows_in": manifest.rows_in, "rows_out": manifest.rows_out, "quarantined": manifest.quarantined})
        run.artifact(DATASET / "card.md")
        run.artifact(DATASET / "contact_sheet.png")
    images = sum(split.images for split in manifest.splits.values())
    refused = quarantined(DATASET / "quarantine.jsonl")
    reasons = f" ({summary(refused)})" if refused else ""
    searchable = "" if can_search(Samples(DATASET, "train")) else NO_SEARCH
    print(
        f"prepare: {images:,} images, {manifest.rows_out:,} samples in {len(manifest.splits)} splits,"
        f" {manifest.quarantined:,} quarantined{reasons}{_overlap()}{searchable} -> {DATASET} (card.md, contact_sheet.png)"
    )


def unseen_by_dvc(settings: Settings) -> Iterator[str]:
    """Warnings about paths that DVC does not track: it covers data/ alone, and follows no link to a folder."""
    remedy = "DVC neither stores what is there nor sees it change; copy it under data/ and `dvc add data`"
    for key, path in named_paths(settings):
        if not key.startswith("data."):
            continue
        whole = Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would follow the links)
        if not whole.is_relative_to(Path("data").absolute()):
            yield f"{key}: {path} is not under data/: {remedy}"
            continue
        above = [step for step in (whole, *whole.parents) if step.is_relative_to(Path("data").absolute())]
        below = (Path(at) / name for at, names, _ in os.walk(whole) for name in names)
        for link in filter(Path.is_symlink, (*(step for step in above if step.is_dir()), *below)):
            yield f"{key}: {link.relative_to(Path.cwd())} is a link to {link.readlink()}: {remedy}"


def can_search(samples: Samples) -> bool:
    """Whether two images, or more, have two questions besides captions each, which the layer search compares."""

    def has_two(images: Iterable[Sequence[int]]) -> bool:
        return len(list(islice((rows for rows in images if len(_questions(samples, rows)) > 1), 2))) == 2

    return has_two([row] for row in range(samples.images)) or has_two(samples.equal_images())


def _questions(samples: Samples, rows: Sequence[int]) -> set[str]:
    texts = (sample for row in rows for sample in samples.texts(row) if sample.images and sample.kind != CAPTION)
    return {turn.question for sample in texts for turn in sample.turns}


def _overlap() -> str:
    if not (DATASET / "overlap.json").exists():  # digits: synthetic images; no raw digit is in two splits
        return ""
    overlap = Overlap.read(DATASET / "overlap.json")
    return f"; {overlap.near:,} training images look like evaluated ones ({'dropped; ' if overlap.dropped else ''}overlap.json)"


if __name__ == "__main__":
    exit_from(main)
