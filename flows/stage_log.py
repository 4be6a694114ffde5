"""Log and progress of a stage on its flow run's page: its lines, a progress bar in steps of 10%, warnings as such."""

from __future__ import annotations

import logging
import re

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from flows import stage_output
from flows.prefect_artifacts import publish


class StageLog:
    """Callback for the output lines of a stage (`flows/dvc_repro.py`)."""

    def __init__(self, stage: str) -> None:
        self._stage, self._logger, self._tenth, self._bar = stage, get_run_logger(), 0, None

    def __call__(self, line: str) -> None:
        text = line.strip()
        if progress := stage_output.BAR.search(text):
            tenth = int(progress[1]) // 10
            if tenth == self._tenth:
                return
            self._tenth = tenth
            self._update_bar(10.0 * tenth, text)
        if not stage_output.DVC_HINTS.search(text):
            self._logger.log(logging.WARNING if stage_output.WARNING.search(text) else logging.INFO, "%s", text)

    def _update_bar(self, percent: float, text: str) -> None:
        if self._bar is None:
            key = re.sub(r"[^a-z0-9]+", "-", f"progress-{self._stage}".lower()).strip("-")
            self._bar = publish(create_progress_artifact, progress=percent, key=key, description=text)
        else:
            publish(update_progress_artifact, artifact_id=self._bar, progress=percent, description=text)
