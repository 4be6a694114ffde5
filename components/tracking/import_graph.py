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
    paths = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


@cache
def imports(module: str) -> frozenset[str]:
    """Full names imported anywhere in `module`, `from a import b` as both `a` and `a.b`; TYPE_CHECKING blocks excluded."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return frozenset(names_of(tree.body))


def names_of(body: list[ast.stmt]) -> Iterator[str]:
    """Full names that statements import, with TYPE_CHECKING blocks excluded."""
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


def closure(module: str, stops: Collection[str] = ()) -> set[str]:
    """`module` and its transitive imports within the project, parent packages included; without the rooms and modules
    `stops`, their exclusive imports, and top-level packages."""
    project = modules()
    visited: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name in visited or name not in project or "." not in name or any(f"{name}.".startswith(f"{s}.") for s in stops):
            continue
        visited.add(name)
        parts = name.split(".")
        pending += [".".join(parts[:n]) for n in range(2, len(parts))]
        pending += imports(name)
    return visited
