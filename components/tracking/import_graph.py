"""Which of our modules import which, read from the source: what code a result depends on."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("components", "flows")
# Rooms and modules of all stages, whose edits change no bytes of a result that goes by its settings and inputs too.
SHARED = tuple(f"components.{name}" for name in ("config", "records", "io", "errors", "process", "tracking", "runtime"))


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Full names that `module` imports anywhere in it, `from a import b` as both `a` and `a.b`; not for type checkers."""
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
    """`module` and the modules of ours that it imports, directly or not, its packages among them; not those of the rooms and
    modules `stop`, nor what only they import, nor the outermost packages."""
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
