"""Sync of run journals (`journal.py`) to MLflow, resumed from the last line that was sent.

Each is sent by `mlflow_mirror.py`; the process may be stopped anywhere and restarted.

    python -m components.tracking.mlflow_sync JOURNAL...        started by a stage: follows them until stdin closes
    python -m ... JOURNAL --below RUN                           started by a flow: follows its stages' journals, too
    alignti sync                                                sends every unsent journal
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from components.errors import DataError
from components.process import is_free
from components.tracking import history
from components.tracking.journal import JOURNALS, first_event, warn
from components.tracking.mlflow_client import one_line
from components.tracking.mlflow_mirror import UNSENT, Mirror
from components.tracking.stage_run import JOURNAL_ONLY, NOT_SENT_WARNED, SENT

PAUSE_S = 3  # polling interval of a growing journal
PAUSE_AFTER_FAULT_S = 30


def sync(tracking_uri: str) -> tuple[int, int]:
    """Send every journal whose process has ended; returns how many were sent and how many are still being written.

    A damaged journal, or one that MLflow rejects, does not block the others; its error is raised at the end.
    """
    sent = still_written = 0
    rejected: Exception | None = None
    unsent = filter(_is_unsent, JOURNALS.glob("*.jsonl"))
    for journal in sorted(unsent, key=_start_time):  # oldest first: runs link to earlier ones
        if not is_free(journal):
            still_written += 1
            continue
        try:
            Mirror(journal, tracking_uri).send(abandoned=True)
            sent += 1
        except Exception as error:
            if not _concerns_one_journal(error):
                raise
            rejected = error
    if rejected:
        raise rejected
    return sent, still_written


def _concerns_one_journal(error: Exception) -> bool:
    """Whether the error concerns one journal, damaged or rejected by MLflow, so that others may still be sent."""
    return isinstance(error, DataError) or getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"


def try_sync(tracking_uri: str) -> bool:
    """`sync` that warns instead of raising; false if the journals were not sent."""
    if tracking_uri == JOURNAL_ONLY:
        return False
    try:
        sync(tracking_uri)
    except Exception as error:  # any exception of MLflow, its server or its database
        warn(f"MLflow does not take the journals ({one_line(error)}); `alignti sync` sends them later")
        return False
    return True


def _is_unsent(journal: Path) -> bool:
    if not journal.stat().st_size:
        return False  # process killed before its first line
    state = history.sync_state(journal.stem) or UNSENT
    return not state["done"] or state["bytes"] < journal.stat().st_size  # a finished journal may gain a `register` event


def _start_time(journal: Path) -> tuple[int, str]:
    try:
        return first_event(journal)["time"], journal.name
    except DataError:  # reported by `Mirror`
        return 0, journal.name


def follow(journals: Sequence[Path], tracking_uri: str, stderr: IO[str], parent: str | None = None) -> bool:
    """Send `journals` until stdin closes, and then their rest; true when all is sent. Only the first fault is printed.

    `parent`: run of a flow, whose stages' journals are followed too, so that stages need no sync process of their own.
    """
    unsent: dict[Path, Mirror | None] = dict.fromkeys(journals)
    scanned, warned, stdin_closed, rejected = set(journals), False, False, False
    while True:
        pause = PAUSE_S
        for journal in list(unsent):
            try:
                mirror = unsent[journal] = unsent[journal] or Mirror(journal, tracking_uri)
                if mirror.send(abandoned=stdin_closed if journal in journals else is_free(journal)):
                    del unsent[journal]
            except Exception as error:  # any exception of MLflow, its server or its database
                pause = PAUSE_AFTER_FAULT_S
                if not warned:
                    reason = one_line(error)
                    warn(f"MLflow at {tracking_uri} does not take this run ({reason}); `alignti sync` sends it later", stderr)
                    warned = True
                if isinstance(error, ImportError):
                    return False
                if not _concerns_one_journal(error):
                    break
                rejected = True
                del unsent[journal]
        new = _new_child_journals(parent, scanned) if parent else []
        unsent |= dict.fromkeys(new)
        if not new and (stdin_closed or not unsent):
            return not unsent and not rejected
        stdin_closed = stdin_closed or bool(select.select([sys.stdin], [], [], 0 if new else pause)[0])


def _new_child_journals(parent: str, scanned: set[Path]) -> list[Path]:
    """New journals of child runs of `parent`; `scanned` gains all journals that were read."""
    new = []
    for journal in sorted(set(JOURNALS.glob("*.jsonl")) - scanned):
        with journal.open("rb") as lines:
            first_line = lines.readline()
        if first_line.endswith(b"\n"):  # else still being written
            scanned.add(journal)
            if f'"{parent}"'.encode() in first_line and (first_event(journal)["parent"] or {}).get("id") == parent:
                new.append(journal)
    return new


def main() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they end the stage; its last lines are still to be sent
        signal.signal(signum, signal.SIG_IGN)
    stderr = os.fdopen(os.dup(2), "w", errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # output of MLflow and Alembic
    uri = os.environ["ALIGNTI_TRACKING_URI"]
    parser = argparse.ArgumentParser()
    parser.add_argument("journals", nargs="+", type=Path)
    parser.add_argument("--below", help="the run whose stages are followed, too")
    args = parser.parse_args()
    sent = follow(args.journals, uri, stderr, args.below)
    stderr.flush()
    os._exit(SENT if sent else NOT_SENT_WARNED)  # the stage waits, and interpreter shutdown is slow with MLflow


if __name__ == "__main__":
    main()
