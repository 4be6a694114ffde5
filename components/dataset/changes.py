"""Changes of a row by reading it, and the keys left unread."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

MASK = re.compile(r"weight|(loss|train(ing|able)?)(_(mask|weight|scale))?")  # 0 or false: not to be learnt


@dataclass
class Changes:
    rules: dict[str, str] = field(default_factory=dict)  # rule -> change it made
    ignored: dict[str, None] = field(default_factory=dict)  # keys that no rule reads, in order
    system: str = ""  # system text that was put before a question


def is_unlearnt(key: str, value: Any) -> bool:
    """Loss mask: whether a key keeps what it belongs to from training."""
    return isinstance(value, int | float) and not value and MASK.fullmatch(key) is not None
