"""`python -m components.dataset`: the stage `prepare`. Reads params/data.yaml and data/, writes artifacts/dataset/."""

from __future__ import annotations

from components.artifacts import DATASET
from components.errors import exit_from
from components.settings import load_settings


def main() -> None:
    settings = load_settings().data
    from components.dataset.prepare import prepare

    manifest = prepare(settings)
    images = sum(split.images for split in manifest.splits.values())
    print(
        f"prepare: {images:,} images, {manifest.rows_out:,} samples in {len(manifest.splits)} splits,"
        f" {manifest.quarantined:,} quarantined -> {DATASET} (card.md, contact_sheet.png)"
    )


if __name__ == "__main__":
    exit_from(main)
