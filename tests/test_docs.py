"""Documentation names files, modules and commands that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from components.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")), *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(r"(?<![\w/.-])((?:components|flows|tests|benchmarks|params|docs|deploy)/[\w/.-]*\w)(?![\w*{])")
MODULE = re.compile(r"python -m ((?:components|flows|benchmarks|tests)\.[\w.]*\w)(?![\w<])")
CODE = re.compile(r"^ *```\w*\n(.*?)^ *```|`([^`]+)`", re.MULTILINE | re.DOTALL)
TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)
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


def _calls(page: Path, program: str) -> Iterator[list[str]]:
    """Arguments of every call of `program` in the code of a page, quoted ones empty and without `...`."""
    for block, span in CODE.findall(page.read_text(encoding="utf-8")):
        for line in (block or span.replace("\n", " ")).splitlines():
            for call in re.split(r"&&|;|\|", re.sub(r"(^|\s)#.*", "", line)):
                words = [word for word in re.sub(r"([\"']).*?\1", '""', call).split() if word != "..."]
                while words and "=" in words[0]:  # a variable of the environment
                    del words[0]
                if words[:1] == [program]:
                    yield words[1:]


def _unknown(command: Any, arguments: list[str]) -> str | None:
    """First command or option of a call that does not exist."""
    for word in arguments:
        if word.startswith("-"):
            options = {"-h", "--help"}.union(*(parameter.opts + parameter.secondary_opts for parameter in command.params))
            if word.partition("=")[0] not in options:
                return word
        elif hasattr(command, "commands"):  # a group
            if word not in command.commands:
                return word
            command = command.commands[word]
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_that_a_page_names_exist(page: Path) -> None:
    """Calls of `alignti`, and of make's targets, which take variables and no options."""
    command = typer.main.get_command(app)
    targets = set(TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8")))
    unknown = [call for call in _calls(page, "alignti") if _unknown(command, call)]
    unknown += [call for call in _calls(page, "make") if any("=" not in word and word not in targets for word in call)]
    assert [" ".join(call) for call in unknown] == []
