from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
        (OSError(24, "Too many open files", "x"), 75),
        (BlockingIOError(11, "Resource temporarily unavailable"), 75),
        (OSError(37, "No locks available"), 75),
        (MemoryError(), 75),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"), 2),
        (RuntimeError("[alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 2),
        (OSError(30, "Read-only file system", "x"), 2),
        (PermissionError(13, "Permission denied", "x"), 2),
        (OSError(36, "File name too long", "x" * 300), 2),
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
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr


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


@pytest.mark.parametrize("folder", [".dvc/tmp/exps/standalone/tmp1a2b", ".dvc/tmp/exps/tmp1a2b"])
def test_runs_of_a_copy_that_dvc_removes_stay_in_the_project(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dvc exp run --temp` and `--queue`."""
    (tmp_path / folder / "params").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / folder)
    code = "from components.process import exit_from; exit_from(lambda: open('.runs/journal', 'a').write('x'))"
    for _ in range(2):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_STAGE": "prepare"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    shutil.rmtree(tmp_path / ".dvc")
    assert (tmp_path / ".runs/journal").read_text() == "xx" and (tmp_path / ".mlflow").is_dir()


@pytest.mark.parametrize("below", ["components", "params/recipes", ".runs/journal"])
@pytest.mark.parametrize("words", [["-m", "components.cli", "plan"], ["-m", "components.cli", "up"], ["-m", "components.irs"]])
def test_below_the_projects_root_the_root_is_named_and_nothing_is_written(tmp_path: Path, below: str, words: list[str]) -> None:
    for folder in ("params", below):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "dvc.yaml").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *words], cwd=tmp_path / below, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"is a folder of the project in {tmp_path}: run it there (cd ..{'/..' * below.count('/')})" in result.stderr
    assert not list((tmp_path / below).iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_text_that_the_terminal_cannot_show_ends_nothing(encoding: str) -> None:
    code = "import components, sys; print('red 红色'); print('blue \\N{TURTLE}', file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert result.stdout == rb"red \u7ea2\u8272" + b"\n" and result.stderr == rb"blue \U0001f422" + b"\n"


def test_a_user_without_an_account_has_a_name_and_a_home() -> None:
    """As in a container that runs as the owner of a mounted folder: DVC asks for both, and ended in a KeyError."""
    code = "import pwd; pwd.getpwuid = {}.__getitem__; import components, getpass; from pathlib import Path"
    code += "; print(getpass.getuser(), Path.home())"
    command = ["env", "-i", f"PYTHONPATH={ROOT}"]
    for given, home in (([], "/"), (["HOME=/tmp"], "/tmp")):
        said = subprocess.run([*command, *given, sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said == f"{os.getuid()} {home}\n"


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


# Of a pytest that was started by nohup, processes would not.
HEARS_SIGHUP = ["env", "--default-signal=HUP", sys.executable]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_finally_blocks_run_and_exits_with_143(number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    stage = subprocess.Popen([*HEARS_SIGHUP, "-c", STAGE], text=True, env=environment, **pipes)  # type: ignore[call-overload]
    assert stage.stdout.readline() == "ready\n"
    stage.send_signal(number)
    stdout, stderr = stage.communicate(timeout=30)
    assert stdout == "saved\n"
    assert stage.returncode == 143
    assert f"stopped by signal {number:d}; run the same command to go on" in stderr


SAVING = """
import os, signal, sys, time
from components import process
path = sys.argv[1]
def main():
    try:
        open(path, "w").write("at work")
        time.sleep(60)
    finally:
        time.sleep(0.5)
        open(path, "a").write(", saved")
"""
CHILDREN = {  # a stage under DVC, and a flow of Prefect, whose handler raises at each SIGTERM
    "stage": 'os.environ["DVC_STAGE"] = "a"\nprocess.exit_from(main)',
    "flow": """def stop(*_): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
process.terminate_once_with_parent()
main()""",
}
PARENT = """
import subprocess, sys, threading, time
for _ in range(12):
    threading.Thread(target=time.sleep, args=[60], daemon=True).start()
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is signalled by Linux")
@pytest.mark.parametrize("kind", CHILDREN)
def test_a_killed_parent_of_many_threads_ends_its_child_which_saves(kind: str, tmp_path: Path) -> None:
    """The kernel signals once per thread; no later signal may break off what the first began. Seen at 9 of 10 kills."""
    for attempt in range(3):
        file = tmp_path / str(attempt)
        words = [sys.executable, "-c", PARENT, SAVING + CHILDREN[kind], str(file)]
        parent = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
        _until(lambda file=file: file.exists() and file.read_text() == "at work")  # type: ignore[misc]
        parent.kill()
        parent.wait()
        _until(lambda file=file: file.read_text() == "at work, saved")  # type: ignore[misc]


def _until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("output", ["stdout", "stderr"])
def test_a_closed_terminal_and_nohup(output: str) -> None:
    """What is printed between a terminal's end and SIGHUP ends nothing; whom nohup started does not hear SIGHUP."""
    main, other = os.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    waits = f'open(sys.argv[1], "w")\n        for _ in range(40): time.sleep(0.05); print(file=sys.{output}, flush=True)'
    code = STAGE.replace("time.sleep(60)", waits)
    with tempfile.TemporaryDirectory() as folder:
        words = [*HEARS_SIGHUP, "-c", code, f"{folder}/saved"]
        stage = subprocess.Popen(words, stdout=other, stderr=other, env=environment)
        os.close(other)
        _until(Path(folder, "saved").exists)
        os.close(main)
        time.sleep(0.2)
        stage.send_signal(signal.SIGHUP)
        assert stage.wait(timeout=30) == 143
        stage = subprocess.Popen(
            ["nohup", sys.executable, *words[len(HEARS_SIGHUP) :]],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert stage.stdout is not None and stage.stdout.readline() == b"ready\n"
        stage.send_signal(signal.SIGHUP)
        assert stage.wait(timeout=30) == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_line_reaches_the_terminal_before_the_next(unbuffered: str) -> None:
    main, other = os.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    code = "import components, os; print('said'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], stdout=other, stderr=other, env=environment)
    os.close(other)
    os.set_blocking(main, False)
    assert os.read(main, 100) == b"said\r\n"
    os.close(main)


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams_end_nothing_and_nothing_else_takes_their_place(closed: str, tmp_path: Path) -> None:
    code = "import components, sys; print('a'); print('b', file=sys.stderr); open(sys.argv[1], 'w').write('c')"
    shell = f'"$0" -c "$1" "$2" {closed}'
    words = ["bash", "-c", shell, sys.executable, code, str(tmp_path / "file")]
    subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert (tmp_path / "file").read_text() == "c"


@pytest.mark.parametrize("code", ["exit_from(lambda: print(1))", "from components.cli import main; main()"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_ends_a_command_without_a_trace(code: str, unbuffered: str) -> None:
    shell = 'set -o pipefail; "$0" -c "$1" --help | true'
    words = [
        "bash",
        "-c",
        shell,
        sys.executable,
        f"import time; from components.process import exit_from; time.sleep(0.3); {code}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (143, "")


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    code = "from components.process import exit_from; exit_from(print)"
    words = ["bash", "-c", 'rmdir "$PWD"; exec "$0" -c "$1"', sys.executable, code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "is no longer there" in result.stderr and "Traceback" not in result.stderr
