"""Processor of a checkpoint folder, for images and text alone.

Without torchvision, transformers 5.23 cannot build a processor that has a video part, even if no video is processed. The
video part is therefore always left out; saving writes the checkpoint's video configuration again, for downstream users.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from components.io import write_text
from components.models.checkpoint_folder import LOCAL, as_model_error, config_of

VIDEO_FILE = "video_preprocessor_config.json"


def load_processor(path: Path) -> Any:
    """Processor of a folder. Raises ModelError if it cannot be read."""
    from transformers import AutoProcessor

    with as_model_error(f"{path}: no usable processor"):
        processor_class = _without_video(path) or AutoProcessor
        processor: Any = processor_class.from_pretrained(path, **LOCAL)
    return processor


def _without_video(path: Path) -> Any:
    """Processor class without its video part; None if it has no video part."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    processor_class: Any = PROCESSOR_MAPPING.get(type(config_of(path)), None)
    if processor_class is None or "video_processor" not in processor_class.get_attributes():
        return None
    return images_only(processor_class, _video_part(path))


def _video_part(path: Path) -> dict[str, Any] | None:
    """Video configuration: in the processor's file, in a file of its own, or, in old releases, in the image processor's."""
    for name, key in (("processor_config.json", "video_processor"), (VIDEO_FILE, None), ("preprocessor_config.json", None)):
        if (path / name).exists():
            config = json.loads((path / name).read_text(encoding="utf-8"))
            if video_config := config.get(key) if key else config:
                return dict(video_config)
    return None


def images_only(processor_class: Any, video: dict[str, Any] | None = None) -> Any:
    """Subclass of `processor_class` whose video processor is None; saved under the name of `processor_class`, with `video`
    as the video configuration."""

    class ImagesOnly(processor_class):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            return [*super()._get_arguments_from_pretrained(*args, **kwargs), None]

        def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
            saved = super().save_pretrained(save_directory, **kwargs)
            if video is not None:
                write_text(Path(save_directory) / VIDEO_FILE, json.dumps(video, indent=2, sort_keys=True) + "\n")
            return saved

        def __reduce__(self) -> tuple[Any, ...]:  # pickle finds classes by name, which fails for a local class
            return _empty_processor, (processor_class, video), self.__dict__

    module = sys.modules[processor_class.__module__]
    if getattr(module, "num2words", processor_class) is None:  # SmolVLM's, which spells out a video's frame count
        module.num2words = str  # type: ignore[attr-defined]
    ImagesOnly.__name__ = processor_class.__name__
    return ImagesOnly


def _empty_processor(processor_class: Any, video: dict[str, Any] | None) -> Any:
    """Empty processor, for pickle to restore its state into."""
    images_only_class = images_only(processor_class, video)
    return images_only_class.__new__(images_only_class)
