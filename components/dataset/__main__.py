"""`python -m components.dataset`: the stage `prepare`. Reads params/data.yaml and data/, writes artifacts/dataset/."""

from __future__ import annotations

from components import tracking
from components.artifacts import DATASET, Overlap
from components.errors import exit_from
from components.settings import load_settings


def main() -> None:
    settings = load_settings()
    from components.dataset.prepare import prepare

    with tracking.stage_run("prepare", runtime=settings.runtime, params=settings.data.model_dump(mode="json")) as run:
        manifest = prepare(settings.data, workers=settings.runtime.workers)
        run.dataset("prepared", manifest.digest)
        run.metrics({"rows_in": manifest.rows_in, "rows_out": manifest.rows_out, "quarantined": manifest.quarantined})
        run.artifact(DATASET / "card.md")
        run.artifact(DATASET / "contact_sheet.png")
    images = sum(split.images for split in manifest.splits.values())
    print(
        f"prepare: {images:,} images, {manifest.rows_out:,} samples in {len(manifest.splits)} splits,"
        f" {manifest.quarantined:,} quarantined{_overlap()} -> {DATASET} (card.md, contact_sheet.png)"
    )


def _overlap() -> str:
    if not (DATASET / "overlap.json").exists():  # digits: images are made, and no raw digit is in two splits
        return ""
    found = Overlap.read(DATASET / "overlap.json")
    return f"; {found.near:,} training images look like evaluated ones ({'dropped; ' if found.dropped else ''}overlap.json)"


if __name__ == "__main__":
    exit_from(main)
