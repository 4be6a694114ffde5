"""Damage done to good input: bytes, JSON and YAML values, and command lines, by a seeded `random.Random`."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD: list[Any] = [
    None, True, 0, -1, 10**30, 1e308, float("nan"), "", " ", "\0", "../../etc/passwd", "/", "no", "-" * 300, "\u202e", "\ud800",
    "{{x}}",
    "<image>" * 3, "<script>", "$HOME", "file:///etc/passwd", "x" * 100_000, [], {}, [[]], {"a": {"b": []}}, [None],
]  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut off, doubled, emptied, or with some bytes changed."""
    kind = rng.randrange(5)
    offset = rng.randrange(len(content)) if content else 0
    if kind == 0:
        return content[:offset]
    if kind == 1:
        return content + content[offset:]
    if kind == 2:
        return b""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 4, 64])):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed) if kind == 3 else bytes(changed[:offset]) + rng.randbytes(rng.randrange(64)) + bytes(changed[offset:])


def altered(value: Any, rng: random.Random) -> Any:
    """A copy of nested dicts and lists of which one entry is replaced, removed, renamed, or wrapped."""
    result = copy.deepcopy(value)
    locations = list(_locations(result))
    if not locations:
        return rng.choice(ODD)
    holder, key = rng.choice(locations)
    kind = rng.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["unknown", "", str(key).upper(), f"{key} "])] = holder.pop(key)
    elif kind == 2:
        holder[key] = [holder[key]]
    elif kind == 3:
        holder[key] = {"value": holder[key]}
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return result


def as_json(value: Any, rng: random.Random) -> bytes:
    """JSON text, now and then with values that Python's parser accepts and JSON does not have."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _locations(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in list(items):
        yield value, key
        yield from _locations(inside)
