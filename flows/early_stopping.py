"""Early stopping of a diverging training, from its journal."""

from __future__ import annotations

import math
from pathlib import Path

from components.tracking.journal import JOURNALS, events
from flows.dvc_repro import StopWhen

LOSS = "loss/total"


def diverged(arm: str, above: float | None) -> StopWhen | None:
    """`stop_when` of `dvc_repro.reproduce` for `arm`: a reason once the loss is not finite or `above` times its first, that of
    a batch without a unit of its terms (no image, no edited sample), which is 0, apart."""
    if above is None:
        return None
    pattern = f"*-distill@{arm}-{'?' * 8}.jsonl"  # eight hex digits: `kd` is not `kd-operations`
    # New losses are detected by count: a resumed run appends to its journal, and file times are too coarse.
    earlier = {journal: len(_losses(journal)) for journal in JOURNALS.glob(pattern)}

    def reason() -> str | None:
        for journal in JOURNALS.glob(pattern):
            losses = _losses(journal)
            if len(losses) > earlier.get(journal, 0):
                first, last = next(filter(None, losses), 0.0), losses[-1]
                if not math.isfinite(last) or last > above * first:
                    return f"distill@{arm} diverged: {LOSS} is {last:.3g}, more than {above:g} times its first, {first:.3g}"
        return None

    return reason


def _losses(journal: Path) -> list[float]:
    return [line["values"][LOSS] for line in events(journal) if line["event"] == "metrics" and LOSS in line["values"]]
