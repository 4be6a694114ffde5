"""Sync of run journals (`journal.py`) to MLflow, resumed from the last line that was sent.

Each is mirrored by `mlflow_mirror.py`, and may be stopped anywhere and started again.

    python -m components.tracking.mlflow_sync JOURNAL...        what a stage starts: follows them until stdin closes
    python -m ... JOURNAL --below RUN                           what a flow starts: follows its stages' journals, too
    alignti sync                                                sends every journal that is left
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
from components.records.record import parsed
from components.tracking.journal import JOURNALS, first_event, warn
from components.tracking.mlflow_client import one_line
from components.tracking.mlflow_mirror import Mirror
from components.tracking.stage_run import JOURNAL_ONLY, NOT_SENT_AND_SAID_SO, SENT

PAUSE_S = 3  # between two looks at a growing journal
PAUSE_AFTER_FAULT_S = 30


def sync(tracking_uri: str) -> tuple[int, int]:
    """Send every journal whose process has ended; returns how many were sent and how many are still being written.

    One that is damaged, or that MLflow calls wrong, does not keep back the others; it is raised at the end.
    """
    sent = live = 0
    refused: Exception | None = None
    for journal in sorted(filter(_is_left, JOURNALS.glob("*.jsonl")), key=_began):  # a run is linked to earlier ones
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
    """It is damaged, or MLflow calls it wrong; others may still be taken."""
    return isinstance(error, DataError) or getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"


def try_sync(tracking_uri: str) -> bool:
    """`sync`, whether MLflow takes what there is; where it does not, a line says why."""
    if tracking_uri == JOURNAL_ONLY:
        return False
    try:
        sync(tracking_uri)
    except Exception as error:  # MLflow, its server and its database raise all sorts
        warn(f"MLflow does not take the journals ({one_line(error)}); `alignti sync` sends them later")
        return False
    return True


def _is_left(journal: Path) -> bool:
    if not journal.stat().st_size:
        return False  # its process was killed before it wrote a word
    file = journal.with_suffix(".sent")
    state = parsed(file) if file.exists() else {"done": False}
    return not state["done"] or state["bytes"] < journal.stat().st_size  # a recorded run may gain its registration


def _began(journal: Path) -> tuple[int, str]:
    try:
        return first_event(journal)["time"], journal.name
    except DataError:  # `Mirror` says so
        return 0, journal.name


def follow(journals: Sequence[Path], tracking_uri: str, voice: IO[str], below: str | None = None) -> bool:
    """Send `journals` while stdin stays open, and their rest when it closes; true when all is sent. Says one fault at most.

    `below`: a flow's run, whose stages are followed too as they begin, so that they need no sender of their own.
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
            except Exception as error:  # MLflow, its server and its database raise all sorts
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
    """The journals of runs whose parent is `below` that have begun since; `known` gains all that were looked at."""
    begun = []
    for journal in sorted(set(JOURNALS.glob("*.jsonl")) - known):
        with journal.open("rb") as lines:
            first = lines.readline()
        if first.endswith(b"\n"):  # else it is being written
            known.add(journal)
            if f'"{below}"'.encode() in first and (first_event(journal)["parent"] or {}).get("id") == below:
                begun.append(journal)
    return begun


def main() -> None:
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they end the stage; what it leaves is still to be sent
        signal.signal(ending, signal.SIG_IGN)
    voice = os.fdopen(os.dup(2), "w", errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MLflow's and Alembic's chatter
    uri = os.environ["ALIGNTI_TRACKING_URI"]
    parser = argparse.ArgumentParser()
    parser.add_argument("journals", nargs="+", type=Path)
    parser.add_argument("--below", help="the run whose stages are followed, too")
    asked = parser.parse_args()
    sent = follow(asked.journals, uri, voice, asked.below)
    voice.flush()
    os._exit(SENT if sent else NOT_SENT_AND_SAID_SO)  # the stage waits, and MLflow's modules take long to come down


if __name__ == "__main__":
    main()
