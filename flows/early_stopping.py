"""Early stopping from outside: watches a training's journal for a diverging loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from components.tracking.journal import JOURNALS, events

LOSS = "loss/total"


def diverged(arm: str, above: float | None) -> Callable[[], str | None] | None:
    """What `dvc.reproduce` asks while it trains `arm`: a reason to stop as soon as the loss is `above` times its first."""
    if above is None:
        return None
    pattern = f"*-distill@{arm}-*.jsonl"
    # A run opens a journal of its own or goes on with one: what it writes is told by count, a file's time is coarser than ours.
    earlier = {journal: len(_losses(journal)) for journal in JOURNALS.glob(pattern)}

    def reason() -> str | None:
        for journal in JOURNALS.glob(pattern):
            losses = _losses(journal)
            if len(losses) > earlier.get(journal, 0):
                first, last = losses[0], losses[-1]
                if not math.isfinite(last) or last > above * first:
                    return f"distill@{arm} diverged: {LOSS} is {last:.3g}, more than {above:g} times its first, {first:.3g}"
        return None

    return reason


def _losses(journal: Path) -> list[float]:
    return [line["values"][LOSS] for line in events(journal) if line["event"] == "metrics" and LOSS in line["values"]]
