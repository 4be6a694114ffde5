from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PIPELINE = """
stages:
  first:
    cmd: python stage.py first raw.txt
    deps: [raw.txt]
    outs: [out/first]
  cell:
    foreach: [a, b]
    do:
      cmd: python stage.py cell-${item} out/first
      deps: [out/first, "${item}.txt"]
      outs: ["out/cell-${item}"]
  last:
    cmd: python stage.py last out/cell-a out/cell-b
    deps: [out/cell-a, out/cell-b]
    outs: [out/last]
"""

# Notes that it ran, fails as `fail-NAME` says (a list of exit codes, one a try), else writes what it read.
STAGE = """
import os, sys
from pathlib import Path
name, *inputs = sys.argv[1:]
with open("ran.log", "a") as log:
    log.write(f"{name} {os.environ.get('ALIGNTI_PARENT_RUN_ID', '')}\\n")
fail = Path(f"fail-{name}")
if fail.exists() and (codes := fail.read_text().split()):
    fail.write_text(" ".join(codes[1:]))
    sys.exit(int(codes[0]))
Path("out").mkdir(exist_ok=True)
Path("out", name).write_text(name + "".join(Path(i).read_text() for i in inputs))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project of four stages that take no time, as the current directory."""
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    return tmp_path


def lay_out(folder: Path) -> None:
    shutil.copytree(ROOT / "params", folder / "params")
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "stage.py").write_text(STAGE)
    for name in ("raw", "a", "b"):
        (folder / f"{name}.txt").write_text(name)
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    no_scm = True\n")  # what `dvc init --no-scm` writes


def ran(project: Path) -> list[str]:
    """Names of the stages that ran, in order, and forget them."""
    log = project / "ran.log"
    names = [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return names


def git(*args: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *args], check=True, capture_output=True)
