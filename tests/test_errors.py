from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from components.errors import DataError, Interrupted, SettingsError, TryAgainError
from components.process import exit_from

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
        (OSError(122, "Disk quota exceeded", "x"), 75),
        (OSError(27, "File too large", "x"), 75),
        (RuntimeError("Error while serializing: IoError(...) (os error 28)"), 75),
        (OSError(30, "Read-only file system", "x"), 2),
        (PermissionError(13, "Permission denied", "x"), 2),
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
        raise OSError(5, "Input/output error", "x")

    with pytest.raises(OSError, match="Input/output"):
        exit_from(main)


@pytest.mark.parametrize("below", ["components", "params/recipes", ".runs/journal"])
@pytest.mark.parametrize("words", [["-m", "components.cli", "plan"], ["-m", "components.cli", "up"], ["-m", "components.irs"]])
def test_below_the_projects_root_the_root_is_named_and_nothing_is_written(tmp_path: Path, below: str, words: list[str]) -> None:
    for folder in ("params", below):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "dvc.yaml").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path / below, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"is a folder of the project in {tmp_path}: run it there (cd ..{'/..' * below.count('/')})" in done.stderr
    assert not list((tmp_path / below).iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_text_that_the_terminal_cannot_show_ends_nothing(encoding: str) -> None:
    code = "import components, sys; print('red 红色'); print('blue \\N{TURTLE}', file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout == rb"red \u7ea2\u8272" + b"\n" and done.stderr == rb"blue \U0001f422" + b"\n"


STAGE = """
import sys, time
from components.process import exit_from
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
