"""Data drift since the champion was trained, from statistics of the prepared data set."""

from __future__ import annotations

from collections.abc import Mapping

from components.records.dataset import Manifest


def statistics(manifest: Manifest) -> dict[str, float]:
    """Statistics by name: fractions, whose names end in `share`, and counts."""
    found: dict[str, float] = {"quarantined/share": manifest.quarantined / manifest.rows_in if manifest.rows_in else 0.0}
    for split, record in manifest.splits.items():
        found |= {f"{split}/images": record.images, f"{split}/samples": record.samples}
        for kind, samples in record.kinds.items():
            found[f"{split}/{kind}/share"] = samples / record.samples if record.samples else 0.0
    return found


def moved(then: Mapping[str, float], now: Mapping[str, float], above: float) -> list[str]:
    """Statistics that changed by more than `above`: absolute for shares, relative for counts."""
    found = []
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name, 0.0), now.get(name, 0.0)
        share = name.endswith("share")
        if abs(after - before) > above * (1.0 if share else max(before, 1.0)):
            found.append(f"{name} {before:.3f} -> {after:.3f}" if share else f"{name} {before:,.0f} -> {after:,.0f}")
    return found
