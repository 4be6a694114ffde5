"""FLOPs of a step as components/cost/step.py counts them: the work of the method, without an implementation's recomputation."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.shapes import DRAWS, ROWS, Size
from components.align_ti.batch import Batch
from components.align_ti.terms import CORE, needs_of
from components.cost.shapes import llava
from components.cost.step import BatchShape, StepPlan, body, head, operations, tower

ALL = needs_of(CORE)
TERMS = {"kd": needs_of(["sft", "kd"]), "kd_only": needs_of(["kd"]), "trl": needs_of(["kd"])}


def step(size: Size, batch: Batch, arm: str, ribbon_rows: int) -> float:
    """FLOPs of one optimiser step of an arm of `benchmarks.step`, the optimiser's own apart."""
    student, teacher = llava(size.tower, size.student), llava(size.tower, size.teacher)
    shape = batch_shape(batch, ribbon_rows)
    if arm == "align_ti_rows":  # upper bound: rows drawn twice are read once
        shape = replace(shape, visual=min(shape.visual, ROWS * shape.images))
    if arm != "reference":
        draws_first = arm in ("align_ti_expanded", "align_ti_flex")
        towers = 2 if arm == "trl" else 1
        return operations(student, teacher, shape, StepPlan(TERMS.get(arm, ALL), draws_first=draws_first, towers=towers)).all
    extra_rows = DRAWS * shape.response
    rows = sum(shape.lengths) + extra_rows
    towers_of_all = 3 * tower(student, shape.images)
    sampling = body(student, shape, 0) + head(size.student, sum(shape.lengths))
    models = 3 * body(student, shape, extra_rows) + body(teacher, shape, extra_rows)
    return models + sampling + 3 * head(size.student, rows) + head(size.teacher, rows) + towers_of_all


def batch_shape(batch: Batch, ribbon_rows: int) -> BatchShape:
    return BatchShape(
        lengths=tuple(batch.attention_mask.sum(1).tolist()),
        response=int(batch.response.sum()),
        visual=int(batch.visual.sum()),
        images=len(batch.input_ids),
        instruction=int(batch.instruction.sum()),
        ribbon=ribbon_rows,
    )
