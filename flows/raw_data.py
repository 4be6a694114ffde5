"""Raw data, `make data`: what `data.dvc` records comes to `data/`, and what is new there is recorded.

`dvc pull data.dvc` refuses where a file under `data/` is new, and `dvc repro` records `data/` as it is, without what was never
pulled.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from components.errors import InputError
from components.process import exit_from
from components.report.markdown import counted
from components.tracking import provenance
from flows import dvc
from flows.jobs import check_idle

RAW = "data.dvc"
PATHS_PER_COMMAND = 1000  # paths in one command


def complete() -> list[str]:
    """Restores the files of `data.dvc` that `data/` lacks; returns the new ones, which it does not record.

    Raises InputError if one cannot be fetched, or differs from what is recorded.
    """
    if not Path(RAW).is_file():  # a project that records its data otherwise
        return []
    provenance.raw()  # says if the file is damaged
    had_data = Path("data").is_dir()
    _dvc("fetch", RAW)
    changes = _uncommitted()
    missing = [path for path in changes.get("deleted", []) if not path.endswith("/")]
    for first in range(0, len(missing), PATHS_PER_COMMAND):
        _dvc("checkout", *missing[first : first + PATHS_PER_COMMAND])
    if missing:
        hint = "; to be without, remove and `dvc add data`" if had_data else ""
        print(f"data/: fetched {counted(len(missing), 'file')} of {RAW}, such as {missing[0]}{hint}")
    if modified := [path for path in changes.get("modified", []) if not path.endswith("/")]:
        examples = " ".join(modified[:5])
        raise InputError(
            f"data/ has {counted(len(modified), 'changed file')}: {examples}; `dvc add data` records the change,"
            f" `dvc checkout --force {examples}` drops it"
        )
    return list(changes.get("added", []))


def record(new: list[str]) -> None:
    """Records `data/` with its new files in `data.dvc`. Raises InputError."""
    _dvc("add", "data")
    print(f"{RAW} now records {counted(len(new), 'new file')} of data/, such as {new[0]}: commit it")


def _uncommitted() -> dict[str, list[str]]:
    status: dict[str, Any] = json.loads(_dvc("data", "status", "--granular", "--json"))
    if "data/" in status.get("not_in_cache", []):  # `dvc fetch` calls this success
        raise InputError(f"no DVC remote has what {RAW} records: `dvc push` where it was added, or `git checkout {RAW}`")
    uncommitted: dict[str, list[str]] = status.get("uncommitted", {})
    return {change: [path for path in paths if Path(path).parts[0] == "data"] for change, paths in uncommitted.items()}


def _dvc(*args: str) -> str:
    """Output of the command; its progress and errors are shown as they come."""
    result = subprocess.run([*dvc.DVC, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise InputError(f"`dvc {' '.join(args[:2])}` failed: what it said is above")
    return result.stdout


def main() -> None:
    check_idle()
    if new := complete():
        record(new)


if __name__ == "__main__":
    exit_from(main)
