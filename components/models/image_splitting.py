"""`image_splitting: false`: one square of fixed size per image, in families that split images into tiles."""

from __future__ import annotations

import json
from pathlib import Path

from components.errors import ModelError
from components.io import write_text

SWITCH = "do_image_splitting"  # option of Idefics3's and SmolVLM's image processors
FILES = ("processor_config.json", "preprocessor_config.json")  # file names since transformers 5, and before


def disable_image_splitting(folder: Path) -> None:
    """Turn splitting off in the checkpoint at `folder`. Raises ModelError if its image processor has no such switch."""
    switched_off = False
    for path in (folder / name for name in FILES):
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        image_processor = config.get("image_processor", config)
        if SWITCH in image_processor:
            image_processor[SWITCH] = False
            write_text(path, json.dumps(config, indent=2) + "\n")  # a new file: the old one may be a link into the hub's cache
            switched_off = True
    if not switched_off:
        raise ModelError(
            f"{folder}: image_splitting is false, and its image processor has no {SWITCH} to turn off; set image_splitting:"
            " true in params/models.yaml"
        )
