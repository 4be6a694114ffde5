"""Records of stage `obtain_models`."""

from __future__ import annotations

from typing import Literal

from components.records.record import Record


class ModelRecord(Record):
    """Usable checkpoint folder."""

    name: str
    role: Literal["teacher", "student"]
    path: str
    origin: str  # "embedded", a hub id, a local folder, two of those, or the teacher that it was pruned from
    revision: str | None
    parameters: int
    size_bytes: int
    sha256: str  # over the folder's files
    visual_tokens: int | None  # visual tokens per image; None if the image's shape decides


class ModelIndex(Record):
    """artifacts/models/index.json"""

    teachers: dict[str, ModelRecord]
    students: dict[str, ModelRecord]
