"""A layer search's record, for tests of what comes after it."""

from __future__ import annotations

from typing import Any

from components.records.irs import LayerChoice, Picked


def layer_choice(layer: int, irs: list[float], **changes: Any) -> LayerChoice:
    picked = Picked(rule="irs", layer=layer, weighting="mean", rows="all", runner_up=None, separated=False)
    others = sorted(range(len(irs)), key=lambda other: (other == layer, -irs[other]))
    facts: dict[str, Any] = {
        "standard_error": [0.01] * len(irs),
        "separated": len(irs) > 1,
        "runner_up": others[0],
        "images": 9,
        "pairs": 27,
        "picked": picked,
        "views": [],
        "region": None,
        "grids": ["16 tokens"],
        "backgrounds": [],
    }
    return LayerChoice(layer=layer, irs=irs, **facts | changes)
