"""Out-of-memory errors: largest part of a step, estimated from shapes, and the setting that lowers it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from components.align_ti.batch import Batch
from components.align_ti.head import rows_per_chunk
from components.align_ti.step import AlignTI
from components.config.distill import DistillSettings
from components.distill.footprint import FLOAT, OPTIMISER, activations_per_token, logits
from components.errors import InputError, first_line, out_of_memory


class OutOfMemory(InputError):
    """A step exceeds the device's memory."""


@contextmanager
def memory_errors(module: AlignTI, batches: list[tuple[Batch, list[int]]], settings: DistillSettings) -> Iterator[None]:
    """Translate the allocators' errors to OutOfMemory; all others pass through."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        parts = estimate(module, max((batch for batch, _ in batches), key=lambda b: b.input_ids.numel()), settings)
        largest = max(parts, key=lambda name: parts[name])
        table = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in sorted(parts.items(), key=lambda x: -x[1]))
        raise OutOfMemory(
            f"out of memory on {batches[0][0].input_ids.device}: the largest part is {largest}; {knobs(settings)[largest]}."
            f" Estimated from the shapes, MiB: {table}. The allocator said: {first_line(error)}"
        ) from error


def knobs(settings: DistillSettings) -> dict[str, str]:
    """Setting that lowers each part of `estimate`."""
    size = "micro_batch_size" if settings.micro_batch_tokens is None else "micro_batch_tokens"  # which the other yields to
    checkpointing = "" if settings.gradient_checkpointing else ", or set gradient_checkpointing: true,"
    return {
        "the student's activations": f"lower {size}{checkpointing} in params/distill.yaml",
        "the ribbon's activations": "lower tpa.draws, or set tpa.max_expanded_length, in params/distill.yaml",
        "logits": "lower logits_chunk_mib in params/distill.yaml",
        "gradients and optimiser state": "train fewer parts (`trainable` in params/distill.yaml) or a smaller student",
        "the student's weights": "take a smaller student (params/models.yaml)",
        "the teacher": "set teacher_weights in params/distill.yaml to bf16, int8 or nf4, or let a smaller one teach"
        " (max_memory_mib in params/teacher.yaml)",
    }


def estimate(module: AlignTI, batch: Batch, settings: DistillSettings) -> dict[str, int]:
    """Estimated bytes per part of a step over `batch`, from shapes alone: orders the parts, but is no exact figure."""
    method, student = module.method, module.student.model
    B, T = batch.input_ids.shape
    rows = int(batch.response.sum(1).max()) * method.draws * B if method.needs.ribbon else 0
    bytes_per_number = FLOAT if settings.precision == "fp32" else FLOAT // 2
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    text = student.config.get_text_config()
    head_rows = int(batch.response.sum()) + (int(batch.visual.sum()) if method.needs.visual else 0)
    chunk_rows = rows_per_chunk(text.vocab_size, method.chunk_mib)
    checkpointed = settings.gradient_checkpointing
    activations = activations_per_token(text.hidden_size, text.intermediate_size, text.num_hidden_layers, checkpointed)
    per_token = activations * bytes_per_number
    return {
        "the student's activations": B * T * per_token,
        "the ribbon's activations": rows * per_token,
        "logits": int(logits(max(head_rows, rows), chunk_rows, text.vocab_size)),
        "gradients and optimiser state": OPTIMISER * trained * FLOAT,
        "the student's weights": sum(p.nbytes for p in module.parameters()),
        "the teacher": _teacher_bytes(module, B * T),
    }


def _teacher_bytes(module: AlignTI, tokens: int) -> int:
    """Bytes of the teacher's weights, plus its key/value cache if a term needs the ribbon."""
    if module.live_teacher is None:
        return 0
    vlm = module.live_teacher.vlm
    weights = sum(p.nbytes for p in vlm.parameters())
    if not module.method.needs.ribbon:
        return weights
    text = vlm.model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = next(vlm.parameters()).element_size()
    return weights + tokens * text.num_hidden_layers * 2 * text.num_key_value_heads * head * size
