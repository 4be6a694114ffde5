"""The one module that calls DVC. Stages run in `dvc` subprocesses: DVC's locks do not hold between threads of a process.

Always `--wait-for-lock`: DVC must lock again after a stage has run, and without it gives up after 3 s, losing the result.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Literal

from components.errors import AlignTIError, InputError

DVC = [sys.executable, "-m", "dvc"]
STAGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")  # so that no name is taken for an option
GRACE_S = 20  # from asking a stage to stop until it is killed

Outcome = Literal["unchanged", "restored", "ran"]
_RAN = re.compile(r"^Running stage '", re.MULTILINE)
_RESTORED = re.compile(r"^Stage '.*' is cached - skipping run", re.MULTILINE)


class StageFailed(AlignTIError):
    """A stage failed; `exit_code` is the stage's own where DVC tells it (75: worth another try)."""

    def __init__(self, stage: str, exit_code: int, said: str) -> None:
        super().__init__(f"stage {stage} failed with exit code {exit_code}; the last it said:\n{said}")
        self.exit_code = exit_code


def graph() -> dict[str, list[str]]:
    """Every stage of `dvc.yaml`, in an order that DVC may run them, and the stages that it needs. Raises InputError."""
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    try:
        with Repo() as repo:
            edges = repo.index.graph  # from a stage to what it depends on
            order = [stage for stage in networkx.topological_sort(edges.reverse()) if isinstance(stage, PipelineStage)]
            return {
                stage.addressing: sorted(d.addressing for d in edges.successors(stage) if isinstance(d, PipelineStage))
                for stage in order
            }
    except DvcException as error:
        raise InputError(f"DVC cannot read the pipeline: {error}") from None


def status() -> dict[str, list[object]]:
    """What has changed per stage, as `dvc status --json` has it; empty when everything is up to date."""
    found = subprocess.run([*DVC, "status", "--json"], capture_output=True, text=True, env=_environment())
    if found.returncode:
        raise InputError(f"`dvc status` failed: {found.stderr.strip()[-2000:]}")
    return json.loads(found.stdout)


def reproduce(stage: str, env: Mapping[str, str] | None = None) -> Outcome:
    """Run `stage` alone if it is stale; whether it needs what comes before it is for the caller to know.

    Raises:
        StageFailed: with the stage's exit code.
    """
    if not STAGE.fullmatch(stage):
        raise InputError(f"{stage!r} is no name of a stage")
    return _repro(stage, ["--single-item", stage], env)


def reproduce_all() -> Outcome:
    """A plain `dvc repro`: "unchanged" when it had nothing to do. Raises StageFailed."""
    return _repro("(all)", [], None)


def _repro(stage: str, words: list[str], env: Mapping[str, str] | None) -> Outcome:
    command = [*DVC, "--wait-for-lock", "repro", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment() | dict(env or {}), start_new_session=True
    )
    try:
        said = _pass_on(process)
        code = process.wait()
    except BaseException:  # Ctrl-C, a cancelled flow: nothing may go on running unseen
        _stop(process)
        raise
    if code:
        told = re.search(r"exited with (-?\d+)", said)
        raise StageFailed(stage, int(told[1]) if told else code, said[-2000:].strip())
    return "ran" if _RAN.search(said) else "restored" if _RESTORED.search(said) else "unchanged"


def _pass_on(process: subprocess.Popen[bytes]) -> str:
    """Everything the process says, shown while it says it (progress bars too)."""
    assert process.stdout is not None
    said = b""
    while chunk := os.read(process.stdout.fileno(), 65536):
        sys.stdout.write(chunk.decode("utf-8", "replace"))
        sys.stdout.flush()
        said += chunk
    return said.decode("utf-8", "replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop DVC and the stage under it: first asked, so that a training can save, then killed."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        else:
            return


def _environment() -> dict[str, str]:
    """This environment, with this Python first: a stage's `python` is looked up in PATH."""
    here = os.path.dirname(sys.executable)  # noqa: PTH120  (resolving the link would leave the virtual environment)
    return {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}", "DVC_NO_ANALYTICS": "1"}
