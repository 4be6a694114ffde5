"""Import graph of the project's modules, parsed from source: the code that a result depends on."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("components", "flows")
# Rooms and modules of all stages, excluded from code fingerprints: settings and inputs are in the fingerprint themselves.
SHARED = tuple(f"components.{name}" for name in ("config", "records", "io", "errors", "process", "tracking", "runtime"))


@cache
def modules() -> dict[str, Path]:
    """Path of every module of the project by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Full names imported anywhere in `module`, `from a import b` as both `a` and `a.b`; TYPE_CHECKING blocks excluded."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return frozenset(_names(tree.body))


def _names(body: list[ast.stmt]) -> Iterator[str]:
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"relative import of {node.module}"
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def closure(module: str, stop: Collection[str] = ()) -> set[str]:
    """`module` and its transitive imports within the project, parent packages included; without the rooms and modules `stop`,
    what only they import, and top-level packages."""
    known = modules()
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in known or "." not in name or any(f"{name}.".startswith(f"{one}.") for one in stop):
            continue
        seen.add(name)
        parts = name.split(".")
        waiting += [".".join(parts[:n]) for n in range(2, len(parts))]
        waiting += imports(name)
    return seen
