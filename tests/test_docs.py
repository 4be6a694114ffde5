"""Documentation names files, modules and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")), *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(r"(?<![\w/.-])((?:components|flows|tests|benchmarks|params|docs|deploy)/[\w/.-]*\w)(?![\w*{])")
MODULE = re.compile(r"python -m ((?:components|flows|benchmarks|tests)\.[\w.]*\w)(?![\w<])")
WRITTEN_BY_THE_READER = {"components/align_ti/terms/l2.py", "params/studies/where.yaml", "benchmarks/results/step-paper.json"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    """NAME, ROOM and the like stand for the reader's own."""
    text = page.read_text(encoding="utf-8")
    places = {name: [ROOT / name] for name in {*FILE.findall(text)} - WRITTEN_BY_THE_READER}
    for name in MODULE.findall(text):
        folder = ROOT / name.replace(".", "/")
        places[name] = [folder.with_suffix(".py"), folder / "__main__.py"]
    assert [
        name for name, paths in places.items() if not any(p.exists() for p in paths) and not re.search("[A-Z]{4}", name)
    ] == []
