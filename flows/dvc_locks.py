"""Files of DVC's that a kill or a full disk leaves broken: the holders of its locks, and `dvc.lock`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.io import write_bytes

RWLOCK = Path(".dvc/tmp/rwlock")
LOCK, KEPT = Path("dvc.lock"), Path(".dvc/tmp/dvc.lock.kept")


def drop_dead() -> None:
    """Drop the dead of `rwlock`'s holders (DVC warns of each, and takes one that nobody reaped for alive), or all of it if it
    was cut off (no DVC command can parse it)."""
    if not RWLOCK.exists():
        return
    from dvc.lock import LockError, make_lock

    with suppress(LockError), make_lock(f"{RWLOCK}.lock", tmp_dir=str(RWLOCK.parent)):  # held: another process is writing it
        try:
            held = json.loads(RWLOCK.read_bytes())
            write = {path: holder for path, holder in held.get("write", {}).items() if _lives(holder)}
            readers = {path: list(filter(_lives, holders)) for path, holders in held.get("read", {}).items()}
            living = {"write": write, "read": {path: holders for path, holders in readers.items() if holders}}
        except ValueError:
            held, living = None, {}
        if held != living:
            RWLOCK.write_text(json.dumps(living), encoding="utf-8")


def _lives(holder: dict[str, Any]) -> bool:
    import psutil  # a dependency of DVC

    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(holder["pid"]).status() != psutil.STATUS_ZOMBIE)
    return False


def keep() -> None:
    """Copy a dvc.lock that DVC has just read or written whole: it rewrites it in place, where a kill leaves its beginning."""
    if LOCK.exists():
        write_bytes(KEPT, LOCK.read_bytes())


def put_back() -> bool:
    """Whether a broken dvc.lock is again the one that was kept; the caller holds DVC's lock. One with a merge's marks stays."""
    if not KEPT.exists() or not LOCK.exists() or b"<<<<<<<" in LOCK.read_bytes() or _is_whole(LOCK):
        return False
    write_bytes(LOCK, KEPT.read_bytes())
    print("dvc.lock was cut off as DVC wrote it, and is again that from before: DVC's cache has what ran since", flush=True)
    return True


def _is_whole(lock: Path) -> bool:
    from dvc.dvcfile import Lockfile
    from dvc.utils.serialize import ParseError
    from dvc.utils.strictyaml import YAMLValidationError, load

    try:
        load(str(lock), Lockfile.SCHEMA)
    except (ParseError, YAMLValidationError):
        return False
    return True
