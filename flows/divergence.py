"""Watching a training from outside, through its journal: has its loss grown past all hope?"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

from components.tracking import JOURNALS

LOSS = "loss/total"


def diverged(arm: str, above: float | None) -> Callable[[], str | None] | None:
    """What `dvc.reproduce` asks while it trains `arm`: a reason to stop as soon as the loss is `above` times its first."""
    if above is None:
        return None
    since = time.time()

    def reason() -> str | None:
        for journal in JOURNALS.glob(f"*-distill@{arm}-*.jsonl"):
            if journal.stat().st_mtime >= since and (losses := _losses(journal.read_text(encoding="utf-8"))):
                first, last = losses[0], losses[-1]
                if not math.isfinite(last) or last > above * first:
                    return f"distill@{arm} diverged: {LOSS} is {last:.3g}, more than {above:g} times its first, {first:.3g}"
        return None

    return reason


def _losses(journal: str) -> list[float]:
    lines = (json.loads(line) for line in journal[: journal.rfind("\n") + 1].splitlines())
    return [line["values"][LOSS] for line in lines if line["event"] == "metrics" and LOSS in line["values"]]
