"""Arguments of `alignti export` and `alignti try`, checked before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from components.config.data import DataLimits
from components.dataset.images import load as load_image
from components.dataset.shards import IMAGE, Sample, Turn
from components.errors import InputError, Refusal

DTYPES = ("fp32", "fp16", "bf16")
SIZE = re.compile(r"\d+(\.\d+)? ?[kmgt]b", re.IGNORECASE)


def check_export(folder: Path, dtype: str | None, shard: str, force: bool) -> None:
    """Raises InputError for an unknown dtype or size, and if `folder` exists, with `force` if it holds no model."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    if not SIZE.fullmatch(shard):
        raise InputError(f"--max-shard-size {shard}: a number with KB, MB, GB or TB, such as 5GB")
    if folder.exists() and not force:
        raise InputError(f"{folder} is there already; choose another folder, or --force to replace it")
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model, and --force replaces nothing else; choose another folder")


def sample_of(images: Sequence[Path], question: str, limits: DataLimits) -> Sample:
    """Sample of question and images, as stored by `prepare`. Raises InputError."""
    text, markers = question.replace(IMAGE, "").strip(), question.count(IMAGE)
    if not text:
        raise InputError('the question is empty: alignti try MODEL --image X "What is on the table?"')
    if any("\ud800" <= char <= "\udfff" for char in text):  # bytes that Python could not decode
        raise InputError("the question is no UTF-8")
    if markers not in (0, len(images)):
        raise InputError(f"the question shows {markers} {IMAGE}, and there are {len(images)} --image: one for each, or none")
    if len(images) == 1 or not markers:
        question = f"{IMAGE}\n" * len(images) + text
    try:
        first, *more = (load_image(image, limits).content for image in images)
    except Refusal as refusal:
        raise InputError(f"--image: {refusal.detail}") from None
    name = " + ".join(map(str, images))
    return Sample("your question", name, "instruction", first, (Turn(question, ""),), tuple(more))
