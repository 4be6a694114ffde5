"""A folder's processor, opened for images and text alone where the packages that its video part needs are absent.

Without torchvision, transformers 5.23 builds no processor that has a video part, also where nobody asks it for videos.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from components.errors import ModelError


def load_processor(path: Path) -> Any:
    """The folder's processor, padding on the right. Raises ModelError if it cannot be read."""
    from transformers import AutoProcessor

    try:
        opener = _without_video(path) or AutoProcessor
        processor = opener.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"{path}: no usable processor: {_first_line(error)}") from None
    if getattr(processor, "tokenizer", None) is not None:
        processor.tokenizer.padding_side = "right"
    return processor


def _without_video(path: Path) -> Any:
    """The folder's processor class less its video part, if it has one that cannot be had here; else None."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return None
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    return images_only(kind) if kind is not None and "video_processor" in kind.get_attributes() else None


def images_only(kind: Any) -> Any:
    """`kind`, a processor class, less its video processor (pass None); saved under the name of `kind`."""

    class ImagesOnly(kind):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            return [*super()._get_arguments_from_pretrained(*args, **kwargs), None]

    module = sys.modules[kind.__module__]
    if getattr(module, "num2words", kind) is None:  # SmolVLM's, which spells out how many frames a video has
        module.num2words = str  # type: ignore[attr-defined]
    ImagesOnly.__name__ = kind.__name__
    return ImagesOnly


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
