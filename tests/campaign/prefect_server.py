"""Prefect's server that refuses, hangs, answers 500, cuts the connection, or loses its database, and comes back.

A flow that calls it may fail, a command may not end in a traceback; whatever was trained stands, and the same flow with the
server as it should be ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
from pathlib import Path

from tests.campaign.kills import COMMANDS, Baseline, execute, find_fault, some_stages
from tests.campaign.trackers import BEHAVIOURS, proxy, serving

SUBCOMMANDS = ["doctor", "doctor --free-slots", "deploy", "status"]


def prefect_server(baseline: Baseline, seed: str, cwd: Path) -> tuple[str, str | None]:
    """A description of the try, and its fault or None."""
    rng = random.Random(seed)
    weights = [rng.random() for _ in BEHAVIOURS]
    weights[0] += rng.choice([0, 1, 5])
    for_s, loses = rng.choice([15, 60, 600]), rng.random() < 0.3
    stages = some_stages(baseline, rng)
    baseline.copy_without(stages, cwd)
    subcommand = rng.choice([None, None, *SUBCOMMANDS])
    command = [sys.executable, "-m", "components.cli", *subcommand.split()] if subcommand else COMMANDS["flow"]
    with contextlib.ExitStack() as stack:
        server = Server(cwd.parent / "prefect", stack)
        proxy_address = stack.enter_context(proxy(server.address, rng, weights, for_s))
        later = threading.Timer(rng.uniform(10, 60), server.lose)
        if loses:
            later.start()
        result = execute(command, cwd, _environment(proxy_address))
        later.cancel()
        if loses:
            later.join()
        shares = ", ".join(f"{name} {weight / sum(weights):.0%}" for name, weight in zip(BEHAVIOURS, weights, strict=True))
        lost = ", its database lost" if loses else ""
        did = f"{subcommand or 'flow'} ({' and '.join(stages)}): {shares} for {for_s} s{lost}, exit code {result.returncode}"
        output = result.stdout + result.stderr
        if result.returncode not in (0, 2, 75) or (subcommand and "Traceback" in output):  # Prefect logs those of a flow
            return did, f"exit code {result.returncode}: {' '.join(output.split())[-700:]}"
        return did, find_fault(baseline, COMMANDS["flow"], cwd, _environment(server.address))


def _environment(address: str) -> dict[str, str]:
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
        args = ["flows.prefect_server", "--host", "127.0.0.1"]
        return self._stack.enter_context(serving(args, self._folder, "/api/health", environment, port))
