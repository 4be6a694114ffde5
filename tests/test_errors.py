from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from components.errors import DataError, Interrupted, SettingsError, TryAgainError, exit_from

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("no such key"), 2),
        (DataError("no such file"), 2),
        (TryAgainError("no network"), 75),
        (Interrupted("saved"), 143),
        (KeyboardInterrupt(), 143),
        (OSError(28, "No space left on device", "x"), 75),
    ],
)
def test_an_error_leaves_as_one_sentence_and_its_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        exit_from(main)
    assert end.value.code == code
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "Traceback" not in told


def test_a_bug_keeps_its_trace() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exit_from(main)


def test_other_faults_of_the_machine_keep_their_trace() -> None:
    def main() -> None:
        raise PermissionError(13, "Permission denied", "x")

    with pytest.raises(PermissionError):
        exit_from(main)


STAGE = """
import sys, time
from components.errors import exit_from
def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("saved", flush=True)
exit_from(main)
"""


def test_sigterm_lets_finally_blocks_run_and_exits_with_143() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    stage = subprocess.Popen([sys.executable, "-c", STAGE], text=True, env=environment, **pipes)  # type: ignore[call-overload]
    assert stage.stdout.readline() == "ready\n"
    stage.send_signal(signal.SIGTERM)
    said, told = stage.communicate(timeout=30)
    assert said == "saved\n"
    assert stage.returncode == 143
    assert "stopped by signal 15; run the same command to go on" in told
