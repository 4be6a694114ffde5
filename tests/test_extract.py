"""Archives of strangers: what is plain comes out, of anything else nothing does."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from components.errors import DataError
from components.extract import Caps, extract

NOISE = random.Random(0).randbytes(3000)
PLAIN = {"a/one.jpg": NOISE, "two.txt": b"", "a/b/c.json": b"{}"}


def tar_of(path: Path, entries: dict[str, bytes], *others: tarfile.TarInfo, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in others:
            tar.addfile(info)
    return path


def zip_of(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def linked_zip(path: Path) -> Path:
    zip_of(path, PLAIN)
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return path


def cut(path: Path, share: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "zip"])
def test_plain_files_come_out_as_they_went_in(tmp_path: Path, mode: str) -> None:
    path = zip_of(tmp_path / "x", PLAIN) if mode == "zip" else tar_of(tmp_path / "x", PLAIN, mode=mode)
    assert extract(path, tmp_path / "out") == 3
    found = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == PLAIN


ZEROS = {"bomb": bytes(20 * 2**20)}
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "symbolic link": (lambda p: tar_of(p, PLAIN, special("link", tarfile.SYMTYPE, "/etc/passwd")), "is a link or a device"),
    "hard link": (lambda p: tar_of(p, PLAIN, special("link", tarfile.LNKTYPE, "two.txt")), "is a link or a device"),
    "device": (lambda p: tar_of(p, PLAIN, special("null", tarfile.CHRTYPE)), "is a link or a device"),
    "fifo": (lambda p: tar_of(p, PLAIN, special("pipe", tarfile.FIFOTYPE)), "is a link or a device"),
    "link in a zip": (linked_zip, "is a link or a device"),
    "absolute path": (lambda p: tar_of(p, {**PLAIN, "/abs": b"x"}), "leads out of the folder"),
    "parent path": (lambda p: tar_of(p, {**PLAIN, "a/../../up": b"x"}), "leads out of the folder"),
    "parent path in a zip": (lambda p: zip_of(p, {**PLAIN, "../up": b"x"}), "leads out of the folder"),
    "a name twice": (lambda p: tar_of(p, {**PLAIN, "./two.txt": b"x"}), "twice"),
    "a folder that is a file": (lambda p: tar_of(p, {**PLAIN, "two.txt/in": b"x"}), "twice"),
    "zip bomb": (lambda p: zip_of(p, ZEROS), "unpacks to more than"),
    "tar bomb": (lambda p: tar_of(p, ZEROS, mode="w:gz"), "unpacks to more than"),
    "many files": (lambda p: tar_of(p, {f"{i}": b"" for i in range(30)}), "more than 20 files"),
    "half a tar": (lambda p: cut(tar_of(p, PLAIN), 0.2), "cut off"),
    "half a tar.gz": (lambda p: cut(tar_of(p, PLAIN, mode="w:gz")), "cut off"),
    "half a zip": (lambda p: cut(zip_of(p, PLAIN)), "cut off"),
    "no archive": (lambda p: p.write_bytes(NOISE) and p, "neither a zip nor a tar"),
    "nothing": (lambda p: p, "is no file"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_of_what_is_not_plain_nothing_is_unpacked(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path / "archive")
    with pytest.raises(DataError, match=message) as stop:
        extract(path, tmp_path / "out", Caps(files=20))
    assert "\n" not in str(stop.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"archive"}


def test_what_is_there_already_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="exists already"):
        extract(tar_of(tmp_path / "x", PLAIN), tmp_path / "out")
