"""Bytes that a training step holds, estimated from shapes: for out-of-memory errors and the cost model."""

from __future__ import annotations

FLOAT = 4  # bytes
LOGITS_AT_ONCE = 6  # chunks that a divergence holds (docs/performance.md)
PER_LAYER = 16  # activations of one layer that the backward pass needs, in hidden states beside the MLP's and the attention's
OPTIMISER = 3  # float32 numbers per trained parameter: its gradient and AdamW's two moments


def activations_per_token(hidden: int, mlp: int, layers: int, checkpointed: bool) -> int:
    """Numbers that the backward pass needs of one token; with checkpointing one state per layer, and one whole layer."""
    layer = PER_LAYER * hidden + 4 * mlp
    return layers * hidden + layer if checkpointed else layers * layer


def logits(rows: float, rows_at_once: float, vocabulary: int) -> float:
    """Bytes of the losses' logits, of which they hold a chunk of rows at a time."""
    return LOGITS_AT_ONCE * min(rows, rows_at_once) * vocabulary * FLOAT
