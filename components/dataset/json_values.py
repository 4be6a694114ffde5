"""Values of parsed JSON rows: absent ones, checked text, and short forms for messages."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from components.dataset.media import Held
from components.errors import Refusal


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object. Raises Refusal malformed_json for a duplicate key."""
    members = dict(pairs)
    if len(members) < len(pairs):
        duplicate = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Refusal("malformed_json", f"the key {duplicate[:60]!r} stands twice in one object")
    return members


def whole_number(digits: str) -> int:
    """JSON integer. Raises Refusal malformed_json for one of more digits than Python reads."""
    try:
        return int(digits)
    except ValueError:
        raise Refusal("malformed_json", f"a number has {len(digits):,} characters, too many to read") from None


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value: Any) -> bool:
    """Null, or empty, as {bytes: null, path: null} is."""
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return is_null(value) or (isinstance(value, str | list | tuple) and not value)


def checked_text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Refusal("wrong_type", f"{what} is text with something in it, not {short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refusal("wrong_type", f"{what} holds half of a surrogate pair, which is no text") from None
    return value


def short(value: Any) -> str:
    text = value.name if isinstance(value, Held) else repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
