"""Memory estimate of a training step from shapes, for out-of-memory errors and the cost model."""

from __future__ import annotations

FLOAT = 4  # bytes
LOGITS_AT_ONCE = 6  # live chunks of logits in a divergence (docs/performance.md)
PER_LAYER = 16  # saved activations of one layer in units of the hidden size, beside the MLP's and the attention's
OPTIMISER = 3  # float32 numbers per trained parameter: gradient and AdamW's two moments


def activations_per_token(hidden: int, mlp: int, layers: int, checkpointed: bool) -> int:
    """Saved activations per token, in numbers; with gradient checkpointing one state per layer plus one whole layer."""
    layer = PER_LAYER * hidden + 4 * mlp
    return layers * hidden + layer if checkpointed else layers * layer


def logits(rows: float, rows_at_once: float, vocabulary: int) -> float:
    """Bytes of the losses' logits, held in chunks of at most `rows_at_once` rows."""
    return LOGITS_AT_ONCE * min(rows, rows_at_once) * vocabulary * FLOAT
