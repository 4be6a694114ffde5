"""Cost of training, counted from shapes: FLOPs of a step, bytes on a device. Pure arithmetic.

A matrix product of (n, a) and (a, b) is 2 n a b. A backward pass is twice its forward pass: once for the activations' gradient,
once for the weights'. Norms, rotations, softmaxes and the optimiser are not counted. Comparison with measurements:
docs/recipes.md, "The cost model".
"""

from __future__ import annotations

from dataclasses import dataclass

from components.align_ti.terms import Needs, union
from components.cost.shapes import Language, Model
from components.distill import footprint


@dataclass(frozen=True)
class BatchShape:
    """B samples of T_i tokens, visual ones included.

    Args:
        response, visual, instruction: tokens of answers, of images, and of text before the answers, over all samples.
        ribbon: distinct alternatives that are neither gold nor EOS.
    """

    lengths: tuple[float, ...]
    response: float
    visual: float
    images: float
    instruction: float = 0
    ribbon: float = 0


@dataclass(frozen=True)
class StepPlan:
    """Options of a step that affect its cost.

    Args:
        terms: needs of each term with a weight (`needs_of`).
        trained: share of the language model's weight gradients that are computed: 1, or 0 if it is frozen.
        draws_first: an extra pass makes the draws: with gradient accumulation or checkpointing.
        checkpointed: gradient checkpointing: layers are recomputed in the backward pass.
        chunk_rows: rows of logits per chunk; if there are more, those of L_kd and L_tpa are recomputed.
        towers: passes of the vision tower over each image; one if teacher and student share a frozen one.
        edited: share of the samples that a term edits.
        written: share of the samples with an answer of the student, as long as the data's and in one turn.
        gradient: the teacher has a backward pass to its inputs, for the weights of visual tokens.
        visual: share of the visual rows with logits.
    """

    terms: tuple[Needs, ...]
    trained: float = 1
    draws_first: bool = False
    checkpointed: bool = False
    chunk_rows: float = float("inf")
    towers: int = 1
    edited: float = 0
    written: float = 0
    gradient: bool = False
    visual: float = 1


@dataclass(frozen=True)
class Operations:
    """FLOPs. Under bf16 those of the student's output head are in TF32 (runtime.py), as its weights are float32; the teacher's
    head and all layers multiply in bf16 and accumulate in float32."""

    bf16: float
    tf32: float

    @property
    def all(self) -> float:
        return self.bf16 + self.tf32


def operations(student: Model, teacher: Model | None, batch: BatchShape, plan: StepPlan) -> Operations:
    """FLOPs of a forward and backward pass over `batch`, the optimiser apart. `teacher`: None if no term needs it."""
    needs = union(plan.terms)
    extra_rows = batch.ribbon if needs.ribbon else 0
    # Rows whose incoming gradients are known in the backward pass only; terms share compared rows.
    recomputable = any(term.teacher and term.response for term in plan.terms) * batch.response + extra_rows
    compared_rows = recomputable + needs.visual * plan.visual * batch.visual
    student_rows = any(not term.teacher for term in plan.terms) * batch.response + compared_rows
    recomputed = recomputable if recomputable > plan.chunk_rows else 0
    bf16 = (2 + plan.trained + plan.checkpointed) * body(student, batch, extra_rows) + plan.towers * tower(
        student, batch.images
    )
    tf32 = (2 + plan.trained) * head(student.language, student_rows) + head(student.language, recomputed)
    if needs.ribbon and plan.draws_first:
        bf16 += body(student, batch, 0)
        tf32 += head(student.language, batch.response)
    pass_flops, head_flops = bf16, (2 + plan.trained) * head(student.language, batch.response)
    if needs.edits:
        bf16 += plan.edited * (pass_flops + tower(student, batch.images))
        tf32 += 2 * plan.edited * head_flops
    bf16 += plan.written * (body(student, batch, 0) + tower(student, batch.images))
    tf32 += plan.written * head(student.language, batch.response)
    for view in needs.views:
        bf16 += view.student * pass_flops + (view.teacher and tower(student, batch.images))
        tf32 += view.student * head_flops
        if view.teacher and teacher is not None:
            bf16 += body(teacher, batch, 0)
            bf16 += 2 * head(teacher.language, batch.response)
    if teacher is not None and needs.teacher:
        if plan.gradient:
            bf16 += 2 * body(teacher, batch, 0)
            tf32 += 2 * head(teacher.language, batch.response)
        maps = needs.attention + len(needs.in_teacher.maps)
        map_flops = 2 * teacher.language.attention * batch.instruction * batch.visual / max(1, len(batch.lengths)) * maps
        bf16 += body(teacher, batch, extra_rows) + map_flops
        bf16 += head(teacher.language, compared_rows + recomputed)
    return Operations(bf16, tf32)


def body(model: Model, batch: BatchShape, extra_rows: float) -> float:
    """FLOPs of a forward pass of projector and layers with `extra_rows` in all, causal attention, without the head."""
    shape = model.language
    tokens = sum(batch.lengths) + extra_rows
    longest = max(batch.lengths)
    pairs = sum(length * (length + 1) / 2 for length in batch.lengths)  # (query, key) pairs of causal attention
    pairs += extra_rows * (longest + extra_rows / len(batch.lengths))  # by a mask: masked pairs are computed too
    layers = shape.layers * (2 * shape.per_layer * tokens + 4 * shape.attention * pairs)
    return 2 * model.projector * batch.visual + layers


def head(shape: Language, rows: float) -> float:
    return 2.0 * shape.hidden * shape.vocabulary * rows


def tower(model: Model, images: float) -> float:
    shape = model.tower
    per_patch = 2 * 3 * shape.patch_px**2 * shape.hidden
    attention = 4 * (shape.window or shape.tokens) * shape.hidden
    return images * model.patches * (per_patch + shape.layers * (2 * shape.per_layer + attention))


@dataclass(frozen=True)
class MemoryPlan:
    """Options of a device that affect its memory; `devices` share the parts in `sharded` ("student", "teacher")."""

    trained: float  # trained parameters
    wide: int  # bytes of an activation: 2 under bf16, 4 in float32
    teacher_bytes: float  # bytes per parameter of the teacher
    devices: int = 1
    sharded: frozenset[str] = frozenset()


def memory(student: Model, teacher: Model | None, batch: BatchShape, plan: StepPlan, options: MemoryPlan) -> dict[str, float]:
    """Bytes per part on one device at the peak of a step over `batch`, the largest micro-batch.

    The teacher holds the activations of one layer at a time, of all for a backward pass of its own (`gradient`).
    """
    shape, needs = student.language, union(plan.terms)
    shards = {name: options.devices if name in options.sharded else 1 for name in ("student", "teacher")}
    tokens, extra_rows = sum(batch.lengths), batch.ribbon if needs.ribbon else 0
    per_token = footprint.activations_per_token(shape.hidden, shape.mlp, shape.layers, plan.checkpointed) * options.wide
    rows = batch.response + batch.visual * plan.visual * needs.visual + extra_rows
    # autocast keeps 16-bit copies of weights
    casts = options.wide * options.trained if options.wide < footprint.FLOAT else 0
    parts = {
        "student's weights": footprint.FLOAT * student.weights / shards["student"] + casts,
        "gradients and optimiser state": footprint.OPTIMISER * footprint.FLOAT * options.trained / shards["student"],
        "activations": (tokens + extra_rows) * per_token,
        "logits": footprint.logits(rows, plan.chunk_rows, shape.vocabulary),
        "teacher": 0.0,
    }
    if teacher is not None and needs.teacher:
        language = teacher.language
        cache = 2 * language.layers * language.attention * language.kv_heads / language.heads * options.wide * tokens
        depth = language.layers if plan.gradient else 1
        activations = (
            footprint.activations_per_token(language.hidden, language.mlp, depth, checkpointed=False) * options.wide * tokens
        )
        weights = options.teacher_bytes * teacher.weights / shards["teacher"]
        keeps_cache = extra_rows and not plan.checkpointed  # alternatives continue over the key/value caches of both models
        parts["teacher"] = weights + activations + (cache if keeps_cache else 0)
    return parts


@dataclass(frozen=True)
class Device:
    """Accelerator by its data sheet: dense FLOP/s in bf16 and in TF32, bytes per second of memory, GiB of memory."""

    title: str
    peak: float
    tf32: float
    bandwidth: float
    gib: float


DEVICES = {
    "a100-80gb": Device("NVIDIA A100 80 GB", 312e12, 156e12, 2.0e12, 80),
    "h100-80gb": Device("NVIDIA H100 SXM 80 GB", 989e12, 495e12, 3.35e12, 80),
    "h200": Device("NVIDIA H200", 989e12, 495e12, 4.8e12, 141),
    "rtx-4090": Device("NVIDIA RTX 4090", 165e12, 82.6e12, 1.0e12, 24),
}

# Share of a GPU's data-sheet peak that training reaches. Assumed, not measured: measured are shares of 0.6 to 0.7 of
# a CPU's rate at large products (benchmarks/results/step-small.json).
UTILISATION = 0.35

# Distinct alternatives per response token, neither gold nor EOS, of d = 4: measured at the start of the digits'
# distillation. Their number falls as the student learns (0.20 there); 4 is the maximum.
ALTERNATIVES = 1.29
GIB = 2**30


def hours(flops: Operations, device: Device) -> float:
    """Device hours under bf16."""
    return (flops.bf16 / device.peak + flops.tf32 / device.tf32) / UTILISATION / 3600


def generation_hours(model: Model, samples: float, batch: int, prompt: float, new_tokens: float, device: Device) -> float:
    """Device hours of generating `new_tokens` to each question of `prompt` tokens, `batch` at a time, weights in 16 bits.

    Prefill is bound by FLOPs; decoding by reading all weights once per token position of the batch.
    """
    batch_shape = BatchShape(lengths=(prompt,), response=0, visual=model.visual, images=1)
    prefill = Operations(samples * (tower(model, 1) + body(model, batch_shape, 0) + head(model.language, 1)), 0)
    decode_seconds = samples / batch * new_tokens * 2 * model.weights / (device.bandwidth * UTILISATION)
    return hours(prefill, device) + decode_seconds / 3600
