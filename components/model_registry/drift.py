"""Data drift since the champion was trained, from statistics of the prepared data set."""

from __future__ import annotations

from collections.abc import Mapping

from components.records.dataset import Manifest


def statistics(manifest: Manifest) -> dict[str, float]:
    """Statistics by name: fractions, whose names end in `share`, and counts."""
    values: dict[str, float] = {"quarantined/share": manifest.quarantined / manifest.rows_in if manifest.rows_in else 0.0}
    for split, record in manifest.splits.items():
        values |= {f"{split}/images": record.images, f"{split}/samples": record.samples}
        for kind, samples in record.kinds.items():
            values[f"{split}/{kind}/share"] = samples / record.samples if record.samples else 0.0
    return values


def changed_statistics(previous: Mapping[str, float], current: Mapping[str, float], threshold: float) -> list[str]:
    """Statistics that changed by more than `threshold`: absolute for shares, relative for counts."""
    changes = []
    for name in sorted(previous.keys() | current.keys()):
        old, new = previous.get(name, 0.0), current.get(name, 0.0)
        share = name.endswith("share")
        if abs(new - old) > threshold * (1.0 if share else max(old, 1.0)):
            changes.append(f"{name} {old:.3f} -> {new:.3f}" if share else f"{name} {old:,.0f} -> {new:,.0f}")
    return changes
