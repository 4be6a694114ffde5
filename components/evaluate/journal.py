"""Append-only journal of answers: a killed evaluation resumes at the first missing one.

Standard library only, for the kit's process writes one too (components/evaluate/kits/vlmeval_worker.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock


class Journal:
    """Answers by key, in a file of JSON lines. The file name must identify everything that an answer depends on."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.answers: dict[str, str] = {}
        path.touch()
        whole = 0
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                self.answers.update(json.loads(line))
            except (ValueError, TypeError):
                break
            whole += len(line) + 1
        os.truncate(path, whole)  # the partial line of a killed run, or a damaged one; what it held is asked for again
        self._lock = Lock()

    def add(self, answers: Mapping[str, str]) -> None:
        """Append answers and fsync; thread-safe."""
        line = json.dumps(dict(answers), ensure_ascii=False) + "\n"
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self.answers.update(answers)

    def close(self) -> None:
        """Remove the file, once the scores are written."""
        self.path.unlink(missing_ok=True)
