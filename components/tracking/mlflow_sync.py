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
from components.tracking.stage_run import JOURNAL_ONLY, NOT_SENT_AND_SAID_SO, SENT

PAUSE_S = 3  # polling interval of a growing journal
PAUSE_AFTER_FAULT_S = 30


def sync(tracking_uri: str) -> tuple[int, int]:
    """Send every journal whose process has ended; returns how many were sent and how many are still being written.

    A damaged journal, or one that MLflow rejects, does not block the others; its error is raised at the end.
    """
    sent = live = 0
    refused: Exception | None = None
    for journal in sorted(filter(_is_left, JOURNALS.glob("*.jsonl")), key=_began):  # oldest first: runs link to earlier ones
        if not is_free(journal):
            live += 1
            continue
        try:
            Mirror(journal, tracking_uri).send(abandoned=True)
            sent += 1
        except Exception as error:
            if not _is_of_one_journal(error):
                raise
            refused = error
    if refused:
        raise refused
    return sent, live


def _is_of_one_journal(error: Exception) -> bool:
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


def _is_left(journal: Path) -> bool:
    if not journal.stat().st_size:
        return False  # process killed before its first line
    state = history.sent(journal.stem) or UNSENT
    return not state["done"] or state["bytes"] < journal.stat().st_size  # a finished journal may gain a `register` event


def _began(journal: Path) -> tuple[int, str]:
    try:
        return first_event(journal)["time"], journal.name
    except DataError:  # reported by `Mirror`
        return 0, journal.name


def follow(journals: Sequence[Path], tracking_uri: str, voice: IO[str], below: str | None = None) -> bool:
    """Send `journals` until stdin closes, and then their rest; true when all is sent. Only the first fault is printed.

    `below`: run of a flow, whose stages' journals are followed too, so that stages need no sync process of their own.
    """
    left: dict[Path, Mirror | None] = dict.fromkeys(journals)
    known, silent, complete, refused = set(journals), False, False, False
    while True:
        pause = PAUSE_S
        for journal in list(left):
            try:
                mirror = left[journal] = left[journal] or Mirror(journal, tracking_uri)
                if mirror.send(abandoned=complete if journal in journals else is_free(journal)):
                    del left[journal]
            except Exception as error:  # any exception of MLflow, its server or its database
                pause = PAUSE_AFTER_FAULT_S
                if not silent:
                    reason = one_line(error)
                    warn(f"MLflow at {tracking_uri} does not take this run ({reason}); `alignti sync` sends it later", voice)
                    silent = True
                if isinstance(error, ImportError):
                    return False
                if not _is_of_one_journal(error):
                    break
                refused = True
                del left[journal]
        begun = _begun(below, known) if below else []
        left |= dict.fromkeys(begun)
        if not begun and (complete or not left):
            return not left and not refused
        complete = complete or bool(select.select([sys.stdin], [], [], 0 if begun else pause)[0])


def _begun(below: str, known: set[Path]) -> list[Path]:
    """New journals of child runs of `below`; `known` gains all journals that were read."""
    begun = []
    for journal in sorted(set(JOURNALS.glob("*.jsonl")) - known):
        with journal.open("rb") as lines:
            first = lines.readline()
        if first.endswith(b"\n"):  # else still being written
            known.add(journal)
            if f'"{below}"'.encode() in first and (first_event(journal)["parent"] or {}).get("id") == below:
                begun.append(journal)
    return begun


def main() -> None:
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they end the stage; its last lines are still to be sent
        signal.signal(ending, signal.SIG_IGN)
    voice = os.fdopen(os.dup(2), "w", errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # output of MLflow and Alembic
    uri = os.environ["ALIGNTI_TRACKING_URI"]
    parser = argparse.ArgumentParser()
    parser.add_argument("journals", nargs="+", type=Path)
    parser.add_argument("--below", help="the run whose stages are followed, too")
    asked = parser.parse_args()
    sent = follow(asked.journals, uri, voice, asked.below)
    voice.flush()
    os._exit(SENT if sent else NOT_SENT_AND_SAID_SO)  # the stage waits, and interpreter shutdown is slow with MLflow


if __name__ == "__main__":
    main()
