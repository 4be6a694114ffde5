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
    stream = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream).to(device)

    student_rows = random(rows, STUDENT).requires_grad_()
    teacher_rows = random(rows, TEACHER)
    head, teacher_head = (random(vocabulary, width) * width**-0.5 for width in (STUDENT, TEACHER))
    weights = torch.rand(rows, generator=stream).to(device)

    def engine() -> Tensor:  # as in L_iva, which has nearly all rows
        return row_divergence(teacher_rows, Head(teacher_head), student_rows, Head(head), weights=weights)

    def reference() -> Tensor:
        with torch.no_grad():
            theirs = teacher_rows @ teacher_head.T
        return (weights * full(theirs, student_rows @ head.T)).sum()

    def measured(way: Callable[[], Tensor]) -> dict[str, float]:
        arm: dict[str, float] = {}

        def work() -> None:
            student_rows.grad = head.grad = None
            started = measure.clock(device)
            loss = way()
            loss.backward()  # type: ignore[no-untyped-call]
            arm["loss"] = float(loss.detach())
            arm["seconds"] = measure.clock(device) - started

        arm["peak_mib"] = peak_bytes(work, device) / measure.MIB
        return arm

    found: dict[str, dict[str, float]] = {}
    for trained in (False, True):
        head.requires_grad_(trained)
        owed = measure.bytes_of([student_rows, head] if trained else [student_rows])
        for name, way in {"engine": engine, "reference": reference}.items():
            arm = measured(way) | {"gradients_mib": owed / measure.MIB}
            found[f"{name}, head {'trained' if trained else 'frozen'}"] = arm
    peaks = {name: arm["peak_mib"] for name, arm in found.items()}
    losses = [way["loss"] for way in found.values()]
    assert max(losses) - min(losses) <= 1e-4 * abs(losses[0]), f"the two ways differ: {losses}"
    about = f"{rows} rows, V = {vocabulary:,}, student {STUDENT} and teacher {TEACHER} wide, float32"
    return {
        **measure.result("step", "memory", about, device),
        "ratios": measure.ratios(peaks, RATIOS),
        "arms": found,
    }
