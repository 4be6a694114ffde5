"""One optimiser step of Align-TI against vanilla KD, a plain reference and TRL: `python -m benchmarks.step --size tiny`

All arms in one process, on the same data and weights. Sizes: tiny and small (CPU), paper (GPU, needs torch, transformers and
accelerate alone), memory (the divergence at V = 151,936; see benchmarks/divergence.py). Writes JSON with `--json OUT`.

What is timed: from a batch on the device to new weights - both models' passes, losses, backward, clipping, AdamW - for each arm
the same. The learning rate is 0, so that every step of every arm starts from the same weights.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import divergence, flops, measure, peer, reference, table
from benchmarks.shapes import DRAWS, EOS, ROWS, SIZES, START, TRAINED, WORST, Size, batch, llava, script
from components.align_ti.step import AlignTI, Method, total
from components.align_ti.terms import CORE
from components.distill.teacher import FrozenTeacher
from components.evaluate.memory import peak_bytes
from components.models.vlm import VLM

ALL = dict.fromkeys(CORE, 1.0)
KD = ALL | {"iva": 0.0, "tpa": 0.0}
KD_ONLY = KD | {"sft": 0.0}
ENGINE = {  # arm -> weights of its terms, distinct draws
    "kd": (KD, None),
    "kd_only": (KD_ONLY, None),
    "align_ti": (ALL, TRAINED),
    "align_ti_start": (ALL, START),
    "align_ti_worst": (ALL, WORST),
    "align_ti_rows": (ALL, TRAINED),  # L_iva over drawn rows
}

APPENDED = {  # GPU arms: alternatives appended, as under gradient checkpointing -> attention over them
    "align_ti_expanded": "sdpa",
    "align_ti_flex": "flex_attention",
}
RATIOS = {  # name -> time of the first arm over that of the second
    "align_ti_vs_kd": ("align_ti", "kd"),
    "align_ti_start_vs_kd": ("align_ti_start", "kd"),
    "align_ti_vs_kd_worst": ("align_ti_worst", "kd"),
    "align_ti_rows_vs_kd": ("align_ti_rows", "kd"),
    "align_ti_vs_reference": ("align_ti", "reference"),
    "expanded_vs_continuation": ("align_ti_expanded", "align_ti"),
    "flex_vs_sdpa": ("align_ti_flex", "align_ti_expanded"),
    "kd_vs_trl": ("trl", "kd_only"),  # tokens per second of ours over theirs
}
MEMORY_RATIOS = {
    "memory_align_ti_vs_kd": ("align_ti", "kd"),
    "memory_align_ti_worst_vs_kd": ("align_ti_worst", "kd"),
    "memory_align_ti_vs_reference": ("align_ti", "reference"),
}


class Scripted(AlignTI):
    """Align-TI with scripted draws; the student's draws are still made, so that their time counts."""

    script: Tensor | None = None

    def _draw_from(self, *args: Any, **kwargs: Any) -> Tensor:
        drawn = super()._draw_from(*args, **kwargs)
        return drawn if self.script is None else self.script


class Bench:
    """A pair of models with a batch, and one optimiser step of each arm on them."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.batch, self.keys = batch(size, device), list(range(size.batch))
        self.student = VLM(llava(size.student, size.tower, device, torch.float32, seed=1)).train()
        teacher = VLM(llava(size.teacher, size.tower, device, size.compute_dtype, seed=2))
        self.teacher = FrozenTeacher(teacher, layer=size.teacher.layers // 2, shares_tower=True)
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0)
        self.ribbon_rows: dict[str, int] = {}  # arm -> rows of its latest step

    def script(self, distinct: float) -> Tensor:
        return script(self.batch, distinct, self.size.shared_vocabulary)

    def method(self, weights: dict[str, float], route: str = "continuation", rows: int | None = None) -> Method:
        shared, options = self.size.shared_vocabulary, {"iva": {"rows": rows}}
        return Method(weights=weights, options=options, draws=DRAWS, eos=EOS, shared_vocabulary=shared, route=route)

    def engine(self, arm: str) -> Callable[[], Tensor]:
        weights, distinct = ENGINE[arm]
        return self.loss(arm, self.method(weights, rows=ROWS if arm == "align_ti_rows" else None), distinct)

    def appended(self, arm: str) -> Callable[[], Tensor]:
        """`align_ti` with the alternatives appended to the sequence, under the arm's kind of attention."""
        loss_fn, student = self.loss(arm, self.method(ALL, "expanded"), TRAINED), self.student.model

        def loss() -> Tensor:
            student.set_attn_implementation({"text_config": APPENDED[arm]})
            try:
                return loss_fn()
            finally:
                student.set_attn_implementation({"text_config": "sdpa"})

        return loss

    def loss(self, arm: str, method: Method, distinct: float | None = None) -> Callable[[], Tensor]:
        """Loss of the present batch, with scripted draws if `distinct` is given."""
        module = Scripted(self.student, self.teacher, method)
        module.script = None if distinct is None else self.script(distinct)
        term_weights = method.weight_vector(self.device)

        def loss() -> Tensor:
            terms = module(self.batch, self.keys)
            self.ribbon_rows[arm] = terms.ribbon_rows
            return total(terms.sums, terms.counts, term_weights)

        return loss

    def reference(self, distinct: float = TRAINED) -> Callable[[], Tensor]:
        draws = self.script(distinct)
        student, teacher = (reference.twin(model, "eager") for model in (self.student.model, self.teacher.vlm.model))
        return lambda: reference.terms(student, teacher, self.batch, draws, self.teacher.layer, EOS).sum()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.size.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def backward(self, loss: Callable[[], Tensor]) -> Tensor:
        """Forward and backward pass; returns the loss."""
        with self.autocast():
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def gradients(self, loss: Callable[[], Tensor]) -> tuple[float, list[Tensor]]:
        value = self.backward(loss)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        self.optimiser.zero_grad()
        return float(value), gradients

    def optimise(self, loss: Callable[[], Tensor]) -> None:
        """One optimiser step, as it is timed."""
        self.backward(loss)
        self.update()

    def update(self) -> None:
        """Clipping and AdamW."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()


def equality(bench: Bench) -> dict[str, float]:
    """Relative difference of loss and of the whole gradient between the engine and the reference, at trained-student draws.

    Raises AssertionError if they differ by more than rounding: then their times must not be compared.
    """
    loss, gradients = bench.gradients(bench.engine("align_ti"))
    reference_loss, reference_gradients = bench.gradients(bench.reference())
    differences = {
        "loss": abs(loss - reference_loss) / abs(reference_loss),
        "gradient": measure.relative_error(gradients, reference_gradients),
    }
    tolerances = {"loss": 2e-2, "gradient": 1e-1} if bench.size.bf16 else {"loss": 1e-5, "gradient": 1e-3}
    assert all(differences[key] <= tolerances[key] for key in tolerances), (
        f"engine and reference differ: {differences}, at most {tolerances}"
    )
    return differences


def run(size: Size, device: torch.device, repeats: int | None = None) -> dict[str, Any]:
    """All results of one size."""
    if size.bf16:
        # The heads' operands come from bf16, which TF32 holds exactly; float32 products would take a GPU ten times as long.
        torch.set_float32_matmul_precision("high")
    bench = Bench(size, device)
    not_measured: dict[str, str] = {}
    losses: dict[str, Callable[[], Tensor]] = {arm: bench.engine(arm) for arm in ENGINE}
    if device.type == "cuda":
        losses |= {arm: bench.appended(arm) for arm in APPENDED}
    differences = None
    try:
        differences = equality(bench)
        losses["reference"] = bench.reference()
    except torch.OutOfMemoryError as error:
        not_measured["reference"] = f"out of memory: {str(error).splitlines()[0]}"
    arms: dict[str, measure.Work] = {arm: partial(bench.optimise, loss) for arm, loss in losses.items()}
    try:
        arms["trl"] = peer.arm(bench)
    except (ImportError, ValueError) as error:
        not_measured["trl"] = str(error)

    bench.optimise(losses["kd"])  # creates the optimiser's state before memory is measured
    standing_bytes = _standing(bench)
    peaks = {arm: standing_bytes + peak_bytes(work, device) for arm, work in arms.items()}
    tokens, responses = int(bench.batch.attention_mask.sum()), int(bench.batch.response.sum())
    timed = measure.compare_arms(arms, repeats or size.repeats, device, f"step {size.name}", RATIOS, tokens=tokens)
    peak_rate = measure.product_rate(device, size.compute_dtype)
    operations = {arm: flops.step(size, bench.batch, arm, bench.ribbon_rows.get(arm, 0)) for arm in arms}
    for name, arm in timed["arms"].items():
        step_flops = operations[name]
        arm |= {
            "peak_mib": peaks[name] / measure.MIB,
            "tflop": step_flops / 1e12,
            "share_of_peak": step_flops / arm["seconds"] / peak_rate,
        }
        if name in bench.ribbon_rows:
            arm["ribbon_rows_per_step"] = bench.ribbon_rows[name] / responses
    return {
        **measure.result("step", size.name, size.about, device),
        "precision": size.precision,
        "batch": size.batch,
        "tokens": tokens,
        "response_tokens": responses,
        **timed,
        "ratios": timed["ratios"] | measure.ratios(peaks, MEMORY_RATIOS),
        "arithmetic": measure.ratios(operations, {name: pair for name, pair in RATIOS.items() if name != "kd_vs_trl"}),
        "parts": {arm: _parts(bench, losses[arm]) for arm in ("kd", "align_ti", "align_ti_worst")},
        "not_measured": not_measured,
        "difference_from_reference": differences,
        "standing_mib": standing_bytes / measure.MIB,
        "peak_tflops": peak_rate / 1e12,
    }


def _standing(bench: Bench) -> int:
    """Bytes held between steps: both models and the optimiser's state."""
    state = [t for s in bench.optimiser.state.values() for t in s.values() if isinstance(t, Tensor)]
    models = [*bench.student.parameters(), *bench.teacher.vlm.parameters()]
    return measure.bytes_of([*(p.data for p in models), *state])


def _parts(bench: Bench, loss: Callable[[], Tensor]) -> dict[str, float]:
    """Share of a step's time per part, over two separate steps."""
    seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def part(name: str) -> Iterator[None]:
        start = measure.clock(bench.device)
        yield
        seconds[name] += measure.clock(bench.device) - start

    with contextlib.ExitStack() as stack:
        for role, owner in (("student", bench.student), ("teacher", bench.teacher)):
            for method, name in {"features": f"{role} plain", "plain": f"{role} plain", "continued": "ribbon"}.items():
                stack.enter_context(mock.patch.object(owner, method, part(name)(getattr(owner, method))))
        for _ in range(2):
            with part("forward"), bench.autocast():
                value = loss()
            with part("backward"):
                value.backward()  # type: ignore[no-untyped-call]
            with part("optimiser"):
                bench.update()
    shares: dict[str, float] = {name: seconds[name] for name in ("student plain", "teacher plain", "ribbon") if name in seconds}
    shares["draws, divergence, cross-entropy"] = seconds["forward"] - sum(shares.values())
    shares |= {name: seconds[name] for name in ("backward", "optimiser")}
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def main() -> None:
    parser = table.arguments("step", __doc__)
    parser.add_argument("--size", choices=[*SIZES, "memory"], required=True)
    args = parser.parse_args()
    device = measure.prepare()
    if args.size == "paper" and device.type != "cuda":
        parser.exit(2, "size paper needs a GPU with about 120 GB: a 7B teacher and a 1.5B student with its AdamW state\n")
    result = divergence.run(device) if args.size == "memory" else run(SIZES[args.size], device)
    print(table.report(result, args.json))


if __name__ == "__main__":
    main()
