"""Atomic writes of files and folders (readers see the old or the new version, never a partial one), digests, and pointers."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.errors import machine_error

LFS_POINTER = b"version https://git-lfs"


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is the pointer that Git LFS leaves in place of one that was not downloaded."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    with draft_of(path) as draft:
        draft.write_bytes(content)


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Temporary neighbour of a file, renamed into place if the block succeeds, so that a crash leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = (), delimiter: str = ",") -> Path:
    """CSV with the header `columns`, then other keys as they occur; missing keys and None are empty cells."""
    names = dict.fromkeys([*columns, *(name for row in rows for name in row)])
    with draft_of(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, delimiter=delimiter, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Draft folder that replaces `folder` if the block succeeds, and is removed if it fails.

    Drafts left by killed processes are removed too: each may be as large as a model.

    Raises the error of `machine_error` for a full or unwritable disk, or a limit of the machine.
    """
    import psutil  # a dependency of accelerate

    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    previous = draft.with_suffix(".old")
    for stale in folder.parent.glob(f".{folder.name}.*.*"):
        pid = stale.name.removeprefix(f".{folder.name}.").partition(".")[0]
        if stale.suffix in (".tmp", ".old") and pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            if stale.suffix == ".old" and not folder.exists():  # killed between the two renames
                stale.replace(folder)
            shutil.rmtree(stale, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if folder.exists():
            folder.replace(previous)
        draft.replace(folder)
    except Exception as error:
        if (fault := machine_error(error)) is None:
            raise
        raise type(fault)(f"{folder} was not written: {fault}") from None
    finally:
        if previous.exists() and not folder.exists():  # stopped between the two renames
            previous.replace(folder)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def sha256(paths: Iterable[Path]) -> str:
    """One digest over the names and contents of files, folders walked in sorted order."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def fingerprint(facts: dict[str, Any], code: Iterable[str | Path]) -> str:
    """16 hex digits over everything that decides a result: settings, inputs and code (rooms or files). Equal: resumable."""
    components = Path(__file__).parent
    files = (file for item in code for file in ([item] if isinstance(item, Path) else (components / item).glob("*.py")))
    digest = sha256(sorted(files))
    text = json.dumps({"code": digest, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
