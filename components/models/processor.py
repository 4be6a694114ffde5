"""Processor of a folder, for images and text alone.

Without torchvision, transformers 5.23 builds no processor that has a video part, also where nobody asks it for videos. So
none is opened with one, whatever is installed; what a checkpoint says of videos is written out again, for those who go on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from components.errors import ModelError, first_line
from components.io import write_text

VIDEO_FILE = "video_preprocessor_config.json"


def load_processor(path: Path) -> Any:
    """The folder's processor, padding on the right. Raises ModelError if it cannot be read."""
    from transformers import AutoProcessor

    try:
        opener = _without_video(path) or AutoProcessor
        processor = opener.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"{path}: no usable processor: {first_line(error)}") from None
    if getattr(processor, "tokenizer", None) is not None:
        processor.tokenizer.padding_side = "right"
    return processor


def _without_video(path: Path) -> Any:
    """The folder's processor class less its video part; None if it has none."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or "video_processor" not in kind.get_attributes():
        return None
    return images_only(kind, _video_part(path))


def _video_part(path: Path) -> dict[str, Any] | None:
    """What the folder says of videos: in the processor's own file, in one of its own, or, in old releases, with images."""
    for name, key in (("processor_config.json", "video_processor"), (VIDEO_FILE, None), ("preprocessor_config.json", None)):
        if (path / name).exists():
            said = json.loads((path / name).read_text(encoding="utf-8"))
            if found := said.get(key) if key else said:
                return dict(found)
    return None


def images_only(kind: Any, video: dict[str, Any] | None = None) -> Any:
    """`kind`, a processor class, less its video processor (pass None); saved under the name of `kind`, with `video` as the
    configuration of the part that was left out."""

    class ImagesOnly(kind):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            return [*super()._get_arguments_from_pretrained(*args, **kwargs), None]

        def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
            saved = super().save_pretrained(save_directory, **kwargs)
            if video is not None:
                write_text(Path(save_directory) / VIDEO_FILE, json.dumps(video, indent=2, sort_keys=True) + "\n")
            return saved

        def __reduce__(self) -> tuple[Any, ...]:  # a class made here is not found by its name, which pickling goes by
            return _unfilled, (kind, video), self.__dict__

    module = sys.modules[kind.__module__]
    if getattr(module, "num2words", kind) is None:  # SmolVLM's, which spells out how many frames a video has
        module.num2words = str  # type: ignore[attr-defined]
    ImagesOnly.__name__ = kind.__name__
    return ImagesOnly


def _unfilled(kind: Any, video: dict[str, Any] | None) -> Any:
    """A processor that pickle fills with what it kept."""
    made = images_only(kind, video)
    return made.__new__(made)
