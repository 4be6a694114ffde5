"""Output of stages: what its lines are, and a printer for several stages at once."""

from __future__ import annotations

import re
import sys
import time

BAR_S = 15  # between two printed states of a labelled progress bar

BAR = re.compile(r"(\d+)%\|")
DVC_HINTS = re.compile(
    r"to track the changes with git|git add|to enable auto staging|dvc config core|dvc push|ing lock file", re.IGNORECASE
)
WARNING = re.compile(r"\bwarning\b|^tracking: |^ERROR", re.I)


class Labelled:
    """Printer of labelled lines, for several stages at once; of a progress bar one state per `BAR_S` seconds.

    Without `verbose` these, warnings, and on `close` the last line alone.
    """

    def __init__(self, label: str, verbose: bool) -> None:
        self._label, self._verbose, self._printed_at, self._last = label, verbose, time.monotonic(), ""

    def __call__(self, line: str) -> None:
        bar, important = BAR.search(line), self._verbose or WARNING.search(line)
        due = time.monotonic() - self._printed_at > BAR_S
        if (important and line.endswith("\n")) or ((important or bar) and due):
            self._print(line)
        elif not (important or bar or DVC_HINTS.search(line)):
            self._last = line

    def close(self) -> None:
        if self._last:
            self._print(self._last)

    def _print(self, line: str) -> None:
        self._printed_at = time.monotonic()
        sys.stdout.write(f"{self._label}: {line.strip().removeprefix(f'{self._label}: ')}\n")
