"""The table of docs/families.md: one check per column, each in the test file of its name, run for every family.

python -m tests.families.table     runs all checks and writes the table
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from components.models.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs/families.md"
START, END = "<!-- written by: python -m tests.families.table -->\n", "<!-- end of the table -->\n"
CHECKS = ("visual_tokens", "several_images", "positions", "masks", "attention", "ribbon_rows", "template", "chain")


def documented(family: str, title: str) -> str:
    """The cell of docs/families.md. Raises KeyError if there is none."""
    lines = [line for line in _parts()[1].splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    return cells[FAMILIES[family].title][title]


def _parts() -> tuple[str, str, str]:
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    table, _, tail = rest.partition(END)
    return head, table, tail


def main() -> None:
    modules = [importlib.import_module(f"tests.families.test_{name}") for name in CHECKS]
    lines = [["family", *(module.TITLE for module in modules)]]
    lines.append(["---"] * len(lines[0]))
    for family, about in FAMILIES.items():
        lines.append([about.title, *(module.check(family) for module in modules)])
        print(*lines[-1], sep=" | ")
    head, _, tail = _parts()
    table = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
    PAGE.write_text(f"{head}{START}\n{table}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
