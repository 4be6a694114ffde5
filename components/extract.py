"""`python -m components.extract ARCHIVE FOLDER`: unpack a tar or zip file that somebody else made.

Plain files and folders alone: a link, a device, an absolute or parent path, a name twice, or more files, bytes or growth
than allowed, and nothing at all is unpacked. The folder is there whole or not at all.
"""

from __future__ import annotations

import argparse
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from tqdm import tqdm

from components.errors import DataError, exit_from

FILES = 5_000_000
GIB = 1024.0
RATIO = 200.0  # of unpacked bytes to the archive's: JPEG and PNG hardly shrink, text by ten, a zip bomb by a thousand
SMALL = 2**20  # bytes whose ratio does not matter
PIECE = 2**20


class Entry(NamedTuple):
    name: str
    size: int  # as the archive states it
    kind: str  # "file", "folder", or what it is instead


class Caps(NamedTuple):
    files: int = FILES
    gib: float = GIB
    ratio: float = RATIO


CAPS = Caps()


def extract(archive: Path, folder: Path, caps: Caps = CAPS) -> int:
    """Unpack `archive` as the new folder `folder`; returns how many files.

    Raises DataError if the folder exists, the archive is of no known kind or cut off, or holds what it should not.
    """
    if folder.exists():
        raise DataError(f"{folder} exists already; name another folder, or remove it")
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with _opened(archive) as entries:
            files = _unpack(archive, entries, draft, caps)
        draft.replace(folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{archive} is damaged or cut off: {error}; fetch it again") from None
    except OSError as error:
        if error.errno is None or "CRC" in str(error):  # what gzip and lzma say of damage
            raise DataError(f"{archive} is damaged or cut off: {error}; fetch it again") from None
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return files


def _unpack(archive: Path, entries: Iterator[tuple[Entry, IO[bytes] | None]], draft: Path, caps: Caps) -> int:
    draft.mkdir(parents=True)
    most = min(caps.gib * 2**30, max(SMALL, caps.ratio * archive.stat().st_size))
    files, written = 0, 0
    for entry, content in tqdm(entries, desc=f"unpack {archive.name}", unit="file", delay=2):
        target = draft / _inside(archive, entry)
        if entry.kind == "folder":  # it is made when a file is in it
            continue
        files += 1
        if files > caps.files:
            raise DataError(f"{archive} holds more than {caps.files:,} files; nothing was unpacked")
        assert content is not None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                while piece := content.read(PIECE):  # counted as it comes: what the archive states may be a lie
                    written += len(piece)
                    if written > most:
                        raise DataError(
                            f"{archive} unpacks to more than {most / 2**20:,.0f} MiB, {caps.ratio:g} times its size at most;"
                            " nothing was unpacked"
                        )
                    file.write(piece)
        except (FileExistsError, IsADirectoryError, NotADirectoryError):
            raise DataError(f"{archive} holds {entry.name!r} twice; nothing was unpacked") from None
        if target.stat().st_size != entry.size:
            raise DataError(f"{archive} is cut off in {entry.name!r}; fetch it again")
    return files


def _inside(archive: Path, entry: Entry) -> PurePosixPath:
    path = PurePosixPath(entry.name.replace("\\", "/"))
    if entry.kind not in ("file", "folder"):
        raise DataError(f"{archive} holds {entry.name!r}, which is {entry.kind}; nothing was unpacked")
    if path.is_absolute() or ".." in path.parts or "\0" in entry.name or ":" in (path.parts or ("",))[0]:
        raise DataError(f"{archive} holds {entry.name!r}, which leads out of the folder; nothing was unpacked")
    return path


@contextmanager
def _opened(archive: Path) -> Iterator[Iterator[tuple[Entry, IO[bytes] | None]]]:
    if not archive.is_file():
        raise DataError(f"{archive} is no file")
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield _of_zip(opened)
    else:
        try:
            tar = tarfile.open(archive, "r:*")  # noqa: SIM115 (closed below)
        except tarfile.ReadError:
            raise DataError(f"{archive} is neither a zip nor a tar file, or is cut off; fetch it again") from None
        with tar:
            yield _of_tar(tar)


def _of_zip(archive: zipfile.ZipFile) -> Iterator[tuple[Entry, IO[bytes] | None]]:
    for info in archive.infolist():
        mode = stat.S_IFMT(info.external_attr >> 16)
        if info.is_dir():
            yield Entry(info.filename, 0, "folder"), None
        elif mode not in (0, stat.S_IFREG):
            yield Entry(info.filename, 0, "a link or a device"), None
        elif info.flag_bits & 1:
            yield Entry(info.filename, 0, "encrypted"), None
        else:
            with archive.open(info) as content:
                yield Entry(info.filename, info.file_size, "file"), content


def _of_tar(archive: tarfile.TarFile) -> Iterator[tuple[Entry, IO[bytes] | None]]:
    for info in archive:
        if info.isdir():
            yield Entry(info.name, 0, "folder"), None
        elif not info.isreg() or info.issparse():
            yield Entry(info.name, 0, "a link or a device"), None
        else:
            yield Entry(info.name, info.size, "file"), archive.extractfile(info)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m components.extract", description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help=".zip, .tar, .tar.gz, .tar.bz2, .tar.xz")
    parser.add_argument("folder", type=Path, help="made new")
    parser.add_argument("--max-files", type=int, default=FILES, metavar="N")
    parser.add_argument("--max-gib", type=float, default=GIB, metavar="N", help="of all files together")
    parser.add_argument("--max-ratio", type=float, default=RATIO, metavar="N", help="unpacked bytes / the archive's")
    asked = parser.parse_args()
    files = extract(asked.archive, asked.folder, Caps(asked.max_files, asked.max_gib, asked.max_ratio))
    print(f"extract: {files:,} files -> {asked.folder}")


if __name__ == "__main__":
    exit_from(main)
