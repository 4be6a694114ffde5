"""What the tests of imports and of `dvc.yaml` reason with."""

from __future__ import annotations

import ast
from pathlib import Path

from components.tracking.import_graph import ROOT, closure, imports, modules, names_of

__all__ = ["ROOT", "closure", "imports", "modules", "names_of", "says_something"]


def says_something(path: Path) -> bool:
    """Whether a file is more than a docstring."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return bool(body) and not (len(body) == 1 and isinstance(body[0], ast.Expr))
