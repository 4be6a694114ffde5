"""The fault campaign: `make faults`, or `python -m tests.campaign --minutes 10 [--seed N] [--kinds params kill ...]`.

Prints how to repeat every try that went wrong. Exit code 1 if any did, or none could be made; a try for which this machine
cannot be prepared (a server that does not start, a full disk) is reported and is no fault.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from flows import servers
from tests.campaign import bad_input, crowds, disks, kills, prefect_server, security, stored, trackers

ROOT = Path(__file__).parents[2]


class Bench:
    """Resources that the slow tries share, each built at its first use."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack

    @cached_property
    def baseline(self) -> kills.Baseline:
        return kills.Baseline.build(self._folder)

    @cached_property
    def server(self) -> str:
        return self._stack.enter_context(trackers.mlflow(self._folder / "mlflow"))

    @cached_property
    def reader(self) -> ProcessPoolExecutor:
        """A process that reads bad input, as native code may abort it."""
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=bad_input.discard_progress)
        self._stack.callback(pool.shutdown)
        return pool

    @cached_property
    def up(self) -> dict[str, servers.Server]:
        return self._stack.enter_context(security.up(self._folder / "up"))


SLOW: dict[str, Callable[[Bench, str, Path], tuple[str, str | None]]] = {
    "kill": lambda bench, seed, cwd: kills.kill(bench.baseline, seed, cwd),
    "disk": lambda bench, seed, cwd: disks.disk(bench.baseline, seed, cwd),
    "crowd": lambda bench, seed, cwd: crowds.crowd(bench.baseline, seed, cwd),
    "stored": lambda bench, seed, cwd: stored.stored(bench.baseline, seed, cwd),
    "secret": lambda bench, seed, cwd: security.secret(bench.baseline, seed, cwd),
    "markup": lambda bench, seed, cwd: security.markup(bench.baseline, seed, cwd),
    "stranger": lambda bench, seed, cwd: security.stranger(bench.up, seed, cwd),
    "tracker": lambda bench, seed, cwd: trackers.tracker(bench.server, seed, cwd),
    "Prefect": lambda bench, seed, cwd: prefect_server.prefect_server(bench.baseline, seed, cwd),
}
EVERY = [*bad_input.KINDS, *SLOW]
SHARE = 0.6  # of the time for those that take minutes


def main() -> None:
    parser = argparse.ArgumentParser(description="Break things at random, and say what did not hold.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="of all tries; else drawn, and printed")
    parser.add_argument("--kinds", nargs="+", default=EVERY, choices=EVERY)
    parser.add_argument("--only", help="KIND:SEED of one try, as it was printed")
    parser.add_argument("--json", type=Path, help="where to write every try that took minutes, and the counts of the others")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        bench = Bench(Path(folder), stack)
        if args.only:
            kind, _, try_seed = args.only.partition(":")
            tries_by_kind = {kind: [_run_one(kind, try_seed, Path(folder), bench)]}
        else:
            kinds = "" if args.kinds == EVERY else f" --kinds {' '.join(args.kinds)}"
            print(f"seed {seed}; again: python -m tests.campaign --minutes {args.minutes:g} --seed {seed}{kinds}", flush=True)
            tries_by_kind = _run_all(args.kinds, seed, args.minutes * 60, Path(folder), bench)
    faults = [case for tries in tries_by_kind.values() for case in tries if case["wrong"]]
    untried = [case for tries in tries_by_kind.values() for case in tries if case["untried"]]
    summary = {
        "seed": seed,
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "tries": {kind: sum(not case["untried"] for case in tries) for kind, tries in tries_by_kind.items()},
        "wrong": faults,
        "disturbed": [case for kind in SLOW for case in tries_by_kind.get(kind, [])],
    }
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    for case in untried:
        print(f"not tried: {case['kind']}:{case['seed']}: {case['untried']}")
    for case in faults:
        print(
            f"WRONG: {case['did']}: {case['wrong']}\n  again: python -m tests.campaign --only '{case['kind']}:{case['seed']}'"
        )
    print("; ".join(f"{kind}: {count} tries" for kind, count in summary["tries"].items()) + f"; {len(faults)} went wrong")
    sys.exit(bool(faults) or not any(summary["tries"].values()))


def _run_all(kinds: list[str], seed: int, seconds: float, folder: Path, bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """As many tries as fit: those of minutes first; next is the kind that had the least time."""
    tries_by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    slow, quick = [kind for kind in kinds if kind in SLOW], [kind for kind in kinds if kind not in SLOW]
    began = time.monotonic()
    for group, deadline in ((slow, seconds * SHARE if quick else seconds), (quick, seconds)):
        spent = dict.fromkeys(group, 0.0)
        while group and time.monotonic() - began < deadline:
            kind, start = min(group, key=lambda name: spent[name]), time.monotonic()
            tries_by_kind[kind].append(_run_one(kind, f"{seed}-{len(tries_by_kind[kind])}", folder, bench))
            spent[kind] += time.monotonic() - start
    return tries_by_kind


def _run_one(kind: str, seed: str, folder: Path, bench: Bench) -> dict[str, Any]:
    did, fault, untried = kind, None, None
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as parent:
        cwd = Path(parent) / "here"
        if kind in SLOW:
            try:
                did, fault = SLOW[kind](bench, seed, cwd)
            except subprocess.TimeoutExpired as error:
                fault = f"not done in {error.timeout:.0f} s: {error.cmd}"
            except Exception as error:  # of the campaign or its machine
                untried = f"{type(error).__name__}: {' '.join(str(error).split())[-600:]}"
            print(f"{kind}:{seed}: {did}: {untried or fault or 'held'}", flush=True)
            shutil.rmtree(cwd, ignore_errors=True)
        else:
            cwd.mkdir()
            try:
                fault = bench.reader.submit(bad_input.run_try, kind, seed, cwd).result()
            except BrokenProcessPool:
                fault = "the process died"
                del bench.reader
    return {"kind": kind, "seed": seed, "did": did, "wrong": fault, "untried": untried}


if __name__ == "__main__":
    main()
