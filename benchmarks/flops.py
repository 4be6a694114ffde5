"""Floating-point operations of a step, counted from shapes: the work the method asks for, whatever the implementation adds.

A matrix product of (n, a) and (a, b) is 2 n a b. A backward pass is twice its forward pass. Recomputation is not counted.
"""

from __future__ import annotations

from benchmarks.shapes import DRAWS, Batch, Language, Size, Tower


def step(size: Size, batch: Batch, arm: str, ribbon_rows: int) -> float:
    """Of one optimiser step of an arm of `benchmarks.step`, the optimiser's own apart."""
    responses = int(batch.response.sum())
    visual = int(batch.visual.sum())
    tokens = int(batch.attention_mask.sum())
    if arm == "reference":
        added = DRAWS * responses
        rows = tokens + added
        sampling = body(size.student, size, batch, 0) + head(size.student, tokens) + tower(size.tower, size.batch)
        models = 3 * body(size.student, size, batch, added) + body(size.teacher, size, batch, added)
        return models + sampling + 3 * head(size.student, rows) + head(size.teacher, rows) + 2 * tower(size.tower, size.batch)
    if arm in ("kd", "kd_only", "trl"):
        sft_rows = responses if arm == "kd" else 0
        kl_rows, added, towers = responses, 0, 2 if arm == "trl" else 1
    else:
        sft_rows, kl_rows, added, towers = responses, responses + visual + ribbon_rows, ribbon_rows, 1
    models = 3 * body(size.student, size, batch, added) + body(size.teacher, size, batch, added)
    heads = 3 * head(size.student, sft_rows + kl_rows) + head(size.teacher, kl_rows)
    if arm in ("align_ti_expanded", "align_ti_flex"):  # the pass that draws
        models += body(size.student, size, batch, 0) + head(size.student, responses)
    return models + heads + towers * tower(size.tower, size.batch)


def body(language: Language, size: Size, batch: Batch, added: int) -> float:
    """Forward pass of projector and layers over the batch with `added` rows more in all, causal attention, without the head."""
    head_dim = language.hidden // language.heads
    per_layer = (
        2 * language.hidden * language.hidden  # queries, output
        + 2 * language.hidden * language.kv_heads * head_dim
        + 3 * language.hidden * language.mlp
    )
    lengths = batch.attention_mask.sum(1).tolist()
    tokens = sum(lengths) + added
    seen = sum(length * (length + 1) / 2 for length in lengths) + added * max(lengths)  # pairs of a row and what it sees
    projector = (size.tower.hidden + language.hidden) * language.hidden * int(batch.visual.sum())
    return 2 * projector + language.layers * (2 * per_layer * tokens + 4 * language.hidden * seen)


def head(language: Language, rows: int) -> float:
    return 2.0 * language.hidden * language.vocabulary * rows


def tower(shape: Tower, images: int) -> float:
    per_layer = 4 * shape.hidden**2 + 2 * shape.hidden * shape.mlp
    patches = 3 * shape.patch_px**2 * shape.hidden
    attention = 4 * shape.tokens**2 * shape.hidden
    return images * (2 * shape.tokens * patches + shape.layers * (2 * shape.tokens * per_layer + attention))
