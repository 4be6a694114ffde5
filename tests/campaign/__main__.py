"""The fault campaign: `make faults`, or `python -m tests.campaign --minutes 10 [--seed N] [--kinds params kill ...]`.

Prints how to repeat every try that went wrong. Exit code 1 if any did, or none could be made; a try for which this machine
cannot be prepared (a server that does not start, a full disk) is told of and is no fault.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from flows import servers
from tests.campaign import bad_input, crowds, disks, kills, prefect_server, security, stored, trackers

ROOT = Path(__file__).parents[2]


class Bench:
    """What tries of minutes share, made when the first of them asks."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack

    @cached_property
    def undisturbed(self) -> kills.Undisturbed:
        return kills.Undisturbed.made(self._folder)

    @cached_property
    def server(self) -> str:
        return self._stack.enter_context(trackers.mlflow(self._folder / "mlflow"))

    @cached_property
    def up(self) -> dict[str, servers.Server]:
        return self._stack.enter_context(security.up(self._folder / "up"))


SLOW: dict[str, Callable[[Bench, str, Path], tuple[str, str | None]]] = {
    "kill": lambda bench, seed, here: kills.kill(bench.undisturbed, seed, here),
    "disk": lambda bench, seed, here: disks.disk(bench.undisturbed, seed, here),
    "crowd": lambda bench, seed, here: crowds.crowd(bench.undisturbed, seed, here),
    "stored": lambda bench, seed, here: stored.stored(bench.undisturbed, seed, here),
    "secret": lambda bench, seed, here: security.secret(bench.undisturbed, seed, here),
    "markup": lambda bench, seed, here: security.markup(bench.undisturbed, seed, here),
    "stranger": lambda bench, seed, here: security.stranger(bench.up, seed, here),
    "tracker": lambda bench, seed, here: trackers.tracker(bench.server, seed, here),
    "Prefect": lambda bench, seed, here: prefect_server.prefect_server(bench.undisturbed, seed, here),
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
    asked = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if asked.seed is None else asked.seed
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        bench = Bench(Path(folder), stack)
        if asked.only:
            kind, _, its = asked.only.partition(":")
            found = {kind: [_one(kind, its, Path(folder), bench)]}
        else:
            kinds = "" if asked.kinds == EVERY else f" --kinds {' '.join(asked.kinds)}"
            print(f"seed {seed}; again: python -m tests.campaign --minutes {asked.minutes:g} --seed {seed}{kinds}", flush=True)
            found = _all(asked.kinds, seed, asked.minutes * 60, Path(folder), bench)
    wrong = [one for tries in found.values() for one in tries if one["wrong"]]
    untried = [one for tries in found.values() for one in tries if one["untried"]]
    told = {
        "seed": seed,
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "tries": {kind: sum(not one["untried"] for one in tries) for kind, tries in found.items()},
        "wrong": wrong,
        "disturbed": [one for kind in SLOW for one in found.get(kind, [])],
    }
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n")
    for one in untried:
        print(f"not tried: {one['kind']}:{one['seed']}: {one['untried']}")
    for one in wrong:
        print(f"WRONG: {one['did']}: {one['wrong']}\n  again: python -m tests.campaign --only '{one['kind']}:{one['seed']}'")
    print("; ".join(f"{kind}: {count} tries" for kind, count in told["tries"].items()) + f"; {len(wrong)} went wrong")
    sys.exit(bool(wrong) or not any(told["tries"].values()))


def _all(kinds: list[str], seed: int, seconds: float, folder: Path, bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """As many tries as fit: those of minutes first; next is the kind that had the least time."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    slow, quick = [kind for kind in kinds if kind in SLOW], [kind for kind in kinds if kind not in SLOW]
    began = time.monotonic()
    for some, until in ((slow, seconds * SHARE if quick else seconds), (quick, seconds)):
        spent = dict.fromkeys(some, 0.0)
        while some and time.monotonic() - began < until:
            kind, before = min(some, key=lambda one: spent[one]), time.monotonic()
            found[kind].append(_one(kind, f"{seed}-{len(found[kind])}", folder, bench))
            spent[kind] += time.monotonic() - before
    return found


def _one(kind: str, seed: str, folder: Path, bench: Bench) -> dict[str, Any]:
    did, wrong, untried = kind, None, None
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as beside:
        here = Path(beside) / "here"
        if kind in SLOW:
            try:
                did, wrong = SLOW[kind](bench, seed, here)
            except subprocess.TimeoutExpired as error:
                wrong = f"not done in {error.timeout:.0f} s: {error.cmd}"
            except Exception as error:  # of the campaign or its machine
                untried = f"{type(error).__name__}: {' '.join(str(error).split())[-600:]}"
            print(f"{kind}:{seed}: {did}: {untried or wrong or 'held'}", flush=True)
            shutil.rmtree(here, ignore_errors=True)
        else:
            here.mkdir()
            with _quiet():
                wrong = bad_input.one(kind, seed, here)
    return {"kind": kind, "seed": seed, "did": did, "wrong": wrong, "untried": untried}


@contextmanager
def _quiet() -> Any:
    """Without the progress bars of whatever is tried."""
    kept, nobody = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nobody)


if __name__ == "__main__":
    main()
