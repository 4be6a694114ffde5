"""Memory of the divergence alone at V = 151,936: one long sample's 729 visual and 128 response rows, against full logits.

Called by `python -m benchmarks.step --size memory`. Both ways compute the same weighted sum of forward KL, and its gradients,
from the same hidden states and heads. Measured is the peak of torch's allocator beyond rows and heads; the gradients of the
student's rows and head, which both ways must hold, are listed apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from components.align_ti.divergence import row_divergence
from components.align_ti.head import Head
from components.evaluate.memory import peak_bytes

ROWS, VOCABULARY, STUDENT, TEACHER = 729 + 128, 151_936, 896, 1536
RATIOS = {
    "memory_divergence_vs_full_logits": ("engine, head frozen", "reference, head frozen"),
    "memory_divergence_vs_full_logits_head_trained": ("engine, head trained", "reference, head trained"),
}


def full(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Forward KL per row from all logits at once."""
    log_t, log_s = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)


def run(device: torch.device, rows: int = ROWS, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    student_rows = random(rows, STUDENT).requires_grad_()
    teacher_rows = random(rows, TEACHER)
    head, teacher_head = (random(vocabulary, width) * width**-0.5 for width in (STUDENT, TEACHER))
    weights = torch.rand(rows, generator=generator).to(device)

    def engine() -> Tensor:  # as in L_iva, which has nearly all rows
        return row_divergence(teacher_rows, Head(teacher_head), student_rows, Head(head), weights=weights)

    def reference() -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher_rows @ teacher_head.T
        return (weights * full(teacher_logits, student_rows @ head.T)).sum()

    def measure_arm(loss_fn: Callable[[], Tensor]) -> dict[str, float]:
        arm: dict[str, float] = {}

        def forward_backward() -> None:
            student_rows.grad = head.grad = None
            start = measure.clock(device)
            loss = loss_fn()
            loss.backward()  # type: ignore[no-untyped-call]
            arm["loss"] = float(loss.detach())
            arm["seconds"] = measure.clock(device) - start

        arm["peak_mib"] = peak_bytes(forward_backward, device) / measure.MIB
        return arm

    arms: dict[str, dict[str, float]] = {}
    for train_head in (False, True):
        head.requires_grad_(train_head)
        gradient_bytes = measure.bytes_of([student_rows, head] if train_head else [student_rows])
        for name, loss_fn in {"engine": engine, "reference": reference}.items():
            arm = measure_arm(loss_fn) | {"gradients_mib": gradient_bytes / measure.MIB}
            arms[f"{name}, head {'trained' if train_head else 'frozen'}"] = arm
    peaks = {name: arm["peak_mib"] for name, arm in arms.items()}
    losses = [arm["loss"] for arm in arms.values()]
    assert max(losses) - min(losses) <= 1e-4 * abs(losses[0]), f"the two ways differ: {losses}"
    about = f"{rows} rows, V = {vocabulary:,}, student {STUDENT} and teacher {TEACHER} wide, float32"
    return {
        **measure.result("step", "memory", about, device),
        "ratios": measure.ratios(peaks, RATIOS),
        "arms": arms,
    }
