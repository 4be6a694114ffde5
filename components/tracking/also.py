"""Sync of run journals (`journal.py`) to TensorBoard and W&B, beside MLflow: `trackers` in params/runtime.yaml.

Each follows a stage's journal as `mlflow_sync.py` does and keeps its offset beside it: curves, params and W&B's final status.
A fault never stops a stage. Lineage, artifacts and the registry are in MLflow alone.

    python -m components.tracking.also TRACKER JOURNAL
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from components.io import write_text
from components.process import project
from components.records.paths import WORKSPACES
from components.tracking.journal import events_from, first_event, warn

PAUSE_S = 3
EVENTS = Path(".tensorboard")  # `tensorboard --logdir .tensorboard`

Line = Mapping[str, Any]


class Tracker(Protocol):
    def __init__(self, start: Line, run: str) -> None: ...
    def log(self, line: Line) -> None: ...
    def close(self) -> None: ...


def _home() -> Path:
    """The project's folder, also for a workspace, which is removed with its flow run."""
    workspaces = WORKSPACES.resolve()
    return workspaces.parents[1] if Path.cwd().parent == workspaces else project()


class TensorBoard:
    """An event file per run."""

    def __init__(self, start: Line, run: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(_home() / EVENTS / start["name"].replace("/", "-") / run))

    def log(self, line: Line) -> None:
        if line["event"] == "metrics":
            for name, value in line["values"].items():
                self._writer.add_scalar(name, value, line["step"] or 0, line["time"] / 1000)
        elif line["event"] == "params":
            table = "\n".join(f"| {name} | {value} |" for name, value in line["values"].items())
            self._writer.add_text("params", f"| param | value |\n|---|---|\n{table}")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """W&B run in the project named after MLflow's experiment; offline unless $WANDB_MODE is set."""

    def __init__(self, start: Line, run: str) -> None:
        import wandb

        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_DIR", str(_home()))
        wandb_settings = wandb.Settings(silent=True, disable_git=True, save_code=False, console="off", x_disable_stats=True)
        self._exit_code = 1  # of a stage that died before its end event
        tags = [f"{name}:{start['tags'][name]}"[:64] for name in ("stage", "recipe") if name in start["tags"]]
        self._run: Any = wandb.init(
            project=start["experiment"], id=run[-60:], name=start["name"], tags=tags, resume="allow", settings=wandb_settings
        )

    def log(self, line: Line) -> None:
        if line["event"] == "metrics" and line["step"] is None:
            self._run.summary.update(dict(line["values"]))
        elif line["event"] == "metrics":
            self._run.log({**line["values"], "step": line["step"]})  # step as a value: W&B's own must never decrease
        elif line["event"] == "params":
            self._run.config.update(dict(line["values"]), allow_val_change=True)
        elif line["event"] == "end":
            self._exit_code = 0 if line["status"] == "FINISHED" else 1

    def close(self) -> None:
        self._run.finish(self._exit_code)


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def follow(name: str, journal: Path) -> None:
    """Forward `journal` to the tracker until its end event, or until stdin closes and the rest is forwarded."""
    state, stdin_closed, tracker = journal.with_suffix(f".{name}"), False, None
    while True:
        lines = _unsent_lines(journal, state)
        for line in lines:
            tracker = tracker or TRACKERS[name](first_event(journal), journal.stem)
            tracker.log(line)
        if stdin_closed or any(line["event"] == "end" for line in lines):
            break
        stdin_closed = bool(select.select([sys.stdin], [], [], PAUSE_S)[0])
    if tracker:
        tracker.close()


def _unsent_lines(journal: Path, state: Path) -> Sequence[Line]:
    """Complete lines not forwarded yet; advances the stored offset."""
    offset = int(state.read_text(encoding="utf-8")) if state.exists() else 0
    lines, end = events_from(journal, offset)
    if lines:
        write_text(state, str(end))
    return lines


def main() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they end the stage; its last lines are still to be sent
        signal.signal(signum, signal.SIG_IGN)
    name, journal = sys.argv[1], Path(sys.argv[2])
    try:
        follow(name, journal)
    except Exception as error:  # any exception of a tracker: no stage fails for it
        warn(f"{name} does not take this run ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        sys.exit(3)


if __name__ == "__main__":
    main()
