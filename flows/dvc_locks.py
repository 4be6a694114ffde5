"""Files of DVC's that a kill or a full disk leaves broken: the holders of its locks, and `dvc.lock`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.io import write_bytes

RWLOCK = Path(".dvc/tmp/rwlock")
LOCK, BACKUP = Path("dvc.lock"), Path(".dvc/tmp/dvc.lock.kept")


def drop_stale_holders() -> None:
    """Drop the dead holders from `rwlock` (DVC warns of each, and takes a zombie for alive), or all of it if it is truncated
    (no DVC command can parse it)."""
    if not RWLOCK.exists():
        return
    from dvc.lock import LockError, make_lock

    with suppress(LockError), make_lock(f"{RWLOCK}.lock", tmp_dir=str(RWLOCK.parent)):  # held: another process is writing it
        try:
            rwlock = json.loads(RWLOCK.read_bytes())
            writers = {path: holder for path, holder in rwlock.get("write", {}).items() if _is_alive(holder)}
            readers = {path: list(filter(_is_alive, holders)) for path, holders in rwlock.get("read", {}).items()}
            live = {"write": writers, "read": {path: holders for path, holders in readers.items() if holders}}
        except ValueError:
            rwlock, live = None, {}
        if rwlock != live:
            RWLOCK.write_text(json.dumps(live), encoding="utf-8")


def _is_alive(holder: dict[str, Any]) -> bool:
    import psutil  # a dependency of DVC

    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(holder["pid"]).status() != psutil.STATUS_ZOMBIE)
    return False


def back_up() -> None:
    """Copy a complete dvc.lock, just read or written by DVC: it rewrites the file in place, and a kill truncates it."""
    if LOCK.exists():
        write_bytes(BACKUP, LOCK.read_bytes())


def restore_backup() -> bool:
    """Replace a broken dvc.lock by its backup; false if there was no need. The caller holds DVC's lock. A file with conflict
    markers stays."""
    if not BACKUP.exists() or not LOCK.exists() or b"<<<<<<<" in LOCK.read_bytes() or is_whole(LOCK):
        return False
    write_bytes(LOCK, BACKUP.read_bytes())
    print("dvc.lock was cut off as DVC wrote it, and is again that from before: DVC's cache has what ran since", flush=True)
    return True


def is_whole(lock: Path) -> bool:
    """Whether DVC reads this dvc.lock."""
    from dvc.dvcfile import Lockfile
    from dvc.utils.serialize import ParseError
    from dvc.utils.strictyaml import YAMLValidationError, load

    try:
        load(str(lock), Lockfile.SCHEMA)
    except (ParseError, YAMLValidationError):
        return False
    return True
