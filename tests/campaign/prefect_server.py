"""Prefect's server that refuses, hangs, answers 500, cuts the connection, or loses its database, and comes back.

A flow that asks it may fail, a command may not end in a traceback; whatever was trained stands, and the same flow with the
server as it should be ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
from pathlib import Path

from tests.campaign.kills import COMMANDS, Undisturbed, done, some_stages, wrong
from tests.campaign.trackers import BEHAVIOURS, proxy, serving

WORDS = ["doctor", "doctor --free-slots", "deploy", "status"]


def prefect_server(undisturbed: Undisturbed, seed: str, here: Path) -> tuple[str, str | None]:
    """What was done, and what was wrong."""
    rng = random.Random(seed)
    weights = [rng.random() for _ in BEHAVIOURS]
    weights[0] += rng.choice([0, 1, 5])
    for_s, loses = rng.choice([15, 60, 600]), rng.random() < 0.3
    stages = some_stages(undisturbed, rng)
    undisturbed.without(stages, here)
    words = rng.choice([None, None, *WORDS])
    command = [sys.executable, "-m", "components.cli", *words.split()] if words else COMMANDS["flow"]
    with contextlib.ExitStack() as stack:
        server = Server(here.parent / "prefect", stack)
        through = stack.enter_context(proxy(server.address, rng, weights, for_s))
        later = threading.Timer(rng.uniform(10, 60), server.lose)
        if loses:
            later.start()
        ended = done(command, here, _asking(through))
        later.cancel()
        if loses:
            later.join()
        shares = ", ".join(f"{name} {weight / sum(weights):.0%}" for name, weight in zip(BEHAVIOURS, weights, strict=True))
        lost = ", its database lost" if loses else ""
        did = f"{words or 'flow'} ({' and '.join(stages)}): {shares} for {for_s} s{lost}, exit code {ended.returncode}"
        said = ended.stdout + ended.stderr
        if ended.returncode not in (0, 2, 75) or (words and "Traceback" in said):  # Prefect logs those of a flow
            return did, f"exit code {ended.returncode}: {' '.join(said.split())[-700:]}"
        return did, wrong(undisturbed, COMMANDS["flow"], here, _asking(server.address))


def _asking(address: str) -> dict[str, str]:
    return {"PREFECT_API_URL": f"{address}/api", "ALIGNTI_TRACKING_URI": "journal"}


class Server:
    """One of Prefect's, of its own database; `lose` takes that away and starts it again at the same port."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.address, self._process = self._start(None)

    def lose(self) -> None:
        self._process.kill()
        self._process.wait()
        for file in self._folder.glob("prefect.db*"):
            file.unlink()
        _, self._process = self._start(int(self.address.rpartition(":")[2]))

    def _start(self, port: int | None) -> tuple[str, subprocess.Popen[bytes]]:
        environment = {
            "PREFECT_HOME": str(self._folder),
            "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{self._folder / 'prefect.db'}",
        }
        words = ["flows.prefect_server", "--host", "127.0.0.1"]
        return self._stack.enter_context(serving(words, self._folder, "/api/health", environment, port))
