"""Files written atomically, and digests of folders."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.errors import Interrupted
from components.io import draft_of, sha256, whole_folder, write_bytes


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_write_one_file_do_not_take_each_others_draft(tmp_path: Path) -> None:
    path, writers = tmp_path / "file", 2
    at_once = threading.Barrier(writers)

    def write(content: str) -> None:
        with draft_of(path) as draft:
            draft.write_text(content)
            at_once.wait(60)  # both drafts are there

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, ["a", "b"]))
    assert path.read_text() in ("a", "b") and list(tmp_path.iterdir()) == [path]


def test_a_digest_depends_on_contents_and_names_and_on_nothing_else(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        for name in ("y", "x") if folder == "a" else ("x", "y"):
            write_bytes(tmp_path / folder / name, name.encode())
    assert sha256([tmp_path / "a"]) == sha256([tmp_path / "b"])
    (tmp_path / "b/x").rename(tmp_path / "b/z")
    assert sha256([tmp_path / "a"]) != sha256([tmp_path / "b"])
    write_bytes(tmp_path / "a/x", b"other")
    assert sha256([tmp_path / "a/x"]) != sha256([tmp_path / "b/z"])


def test_drafts_of_killed_processes_are_removed_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", "pass"])
    killed.wait()
    left = [tmp_path / f".arm.{pid}.{end}" for pid in (killed.pid, os.getppid()) for end in ("tmp", "old")]
    others = [tmp_path / f".arm_2.{killed.pid}.tmp", tmp_path / ".arm.notes.tmp", tmp_path / "arm"]
    for folder in (*left, *others):
        (folder / "model").mkdir(parents=True)
    with whole_folder(tmp_path / "arm") as draft:
        (draft / "weights").touch()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (*left[2:], *others)}
    assert (tmp_path / "arm/weights").exists()


def test_a_stop_between_two_renames_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lost both."""
    folder, replace = tmp_path / "arm", Path.replace
    folder.mkdir()
    (folder / "old").touch()

    def stopped(source: Path, target: Path) -> Path:
        if source.suffix == ".tmp":
            raise Interrupted("stopped")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(Interrupted), whole_folder(folder):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["arm", "old"]
    folder.rename(tmp_path / f".arm.{os.getpid()}.old")  # as a kill there leaves it
    with pytest.raises(ZeroDivisionError), whole_folder(folder):
        _ = 1 / 0
    assert [path.name for path in tmp_path.rglob("*")] == ["arm", "old"]
