"""Disks that refuse writes while stages of the recipe `smoke` run: no room, no inodes, a read-only folder, a limit on files.

Once they accept them again, the same command has to end with the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.campaign.kills import COMMANDS, Baseline, find_fault, some_stages, start, wait

MOUNT = shutil.which("mount") if os.geteuid() == 0 else None
PLENTY = "size=4g,nr_inodes=1000000"
FOLDERS = ("artifacts", "artifacts/students", "artifacts/scores", "reports", ".runs", ".mlflow", ".dvc/cache", ".dvc/tmp", ".")
LARGEST = (4096, 65536, 262144)  # bytes of one file: the nearest to a quota, which root is not held to


def disk(baseline: Baseline, seed: str, cwd: Path) -> tuple[str, str | None]:
    """A description of the try, and its fault, meanwhile or afterwards, or None."""
    rng = random.Random(seed)
    stages, command = some_stages(baseline, rng), rng.choice(["dvc repro", "make repro"])
    refusal = rng.choice(["room", "inodes", "read-only", "file size"] if MOUNT else ["file size"])
    with _file_system(cwd) as inside:
        baseline.copy_without(stages, inside)
        largest = rng.choice(LARGEST) if refusal == "file size" else resource.RLIM_INFINITY
        log = cwd.with_suffix(".said")
        process = start(COMMANDS[command], inside, log, partial(_limit, largest))
        when = "from the start"
        if refusal != "file size" and rng.random() < 0.7:
            when = wait(process, sum(baseline.seconds[stage] for stage in stages), inside, rng)
        with _refused(refusal, inside, rng) as limitation:
            process.wait(900)
        how = limitation or f"files of {largest} bytes at most"
        did = f"{command} of {' and '.join(stages)}: {how} {when}, exit code {process.returncode}"
        if "Traceback" in (text := log.read_text(errors="replace")):
            return did, f"a traceback: {text[text.index('Traceback') :][-600:]}"
        if command != "dvc repro" and process.returncode not in (0, 2, 75):
            return did, f"exit code {process.returncode}: {text[-600:]}"
        return did, find_fault(baseline, COMMANDS[command], inside)


@contextlib.contextmanager
def _refused(refusal: str, inside: Path, rng: random.Random) -> Iterator[str]:
    """Hold the limitation for the time of the block; yields its description."""
    if refusal == "room":
        mib = rng.choice([0, 1, 2, 4, 8, 16])
        yield from _remounted(inside.parent, f"size={(shutil.disk_usage(inside).used >> 20) + 1 + mib}m", f"{mib} MiB of room")
    elif refusal == "inodes":
        free, used = rng.choice([1, 4, 16, 64]), (stats := os.statvfs(inside)).f_files - stats.f_ffree
        yield from _remounted(inside.parent, f"nr_inodes={used + free}", f"{free} inodes")
    elif refusal == "read-only":
        folder = inside / rng.choice([name for name in FOLDERS if (inside / name).is_dir()])
        _mount("--bind", str(folder), str(folder))
        _mount("-o", "remount,bind,ro", str(folder))
        try:
            yield f"{folder.relative_to(inside)} read-only"
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    else:
        yield ""


def _remounted(folder: Path, options: str, limitation: str) -> Iterator[str]:
    _mount("-o", f"remount,{options}", str(folder))
    try:
        yield limitation
    finally:
        _mount("-o", f"remount,{PLENTY}", str(folder))


@contextlib.contextmanager
def _file_system(cwd: Path) -> Iterator[Path]:
    """A folder in a file system of its own, where that may be mounted."""
    cwd.mkdir()
    if not MOUNT:
        yield cwd / "run"
        return
    _mount("-t", "tmpfs", "-o", PLENTY, "tmpfs", str(cwd))
    try:
        yield cwd / "run"
    finally:
        subprocess.run(["umount", "--lazy", str(cwd)], check=True)


def _mount(*args: str) -> None:
    assert MOUNT
    subprocess.run([MOUNT, *args], check=True)


def _limit(largest: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
