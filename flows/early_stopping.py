"""Early stopping from outside: watches a training's journal for a diverging loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

from components.tracking.journal import JOURNALS

LOSS = "loss/total"


def diverged(arm: str, above: float | None) -> Callable[[], str | None] | None:
    """What `dvc.reproduce` asks while it trains `arm`: a reason to stop as soon as the loss is `above` times its first."""
    if above is None:
        return None
    pattern = f"*-distill@{arm}-*.jsonl"
    # A run opens a journal of its own or goes on with one: what it writes is told by size, a file's time is coarser than ours.
    earlier = {journal: journal.stat().st_size for journal in JOURNALS.glob(pattern)}

    def reason() -> str | None:
        for journal in JOURNALS.glob(pattern):
            text = journal.read_bytes()
            if gained := _losses(text[earlier.get(journal, 0) :]):
                first, last = _losses(text)[0], gained[-1]
                if not math.isfinite(last) or last > above * first:
                    return f"distill@{arm} diverged: {LOSS} is {last:.3g}, more than {above:g} times its first, {first:.3g}"
        return None

    return reason


def _losses(journal: bytes) -> list[float]:
    lines = (json.loads(line) for line in journal[: journal.rfind(b"\n") + 1].splitlines())
    return [line["values"][LOSS] for line in lines if line["event"] == "metrics" and LOSS in line["values"]]
