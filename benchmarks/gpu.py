"""What a GPU has to show, in at most eight minutes and in order of worth: `python -m benchmarks.gpu --json OUT`

Each part is a process of its own with a share of the time that is left. OUT has its result before the next begins, and of a
part that is cut off the paths measured until then. `--dry-run`: tiny shapes, on a CPU too.
Exit code 1 if a path differs from the plain one or a part fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import loading, measure, step, table
from benchmarks.measure import relative_error
from benchmarks.shapes import EOS, PAD, SIZES, Size, llava
from components.align_ti.head import Head
from components.cost.shapes import Language, Tower
from components.io import write_text

MINUTES = 8.0
PAPER_GIB = 120  # memory of step --size paper
EQUAL = Size(  # wide enough for every kernel, small enough for seconds
    name="equal",
    about="a 128-wide student, a 256-wide teacher, 2 layers each, 64 visual tokens, V = 4,096",
    tower=Tower(hidden=128, layers=2, heads=2, mlp=256, image_px=64, patch_px=8),
    student=Language(hidden=128, layers=2, heads=2, kv_heads=1, mlp=256, vocabulary=4096),
    teacher=Language(hidden=256, layers=2, heads=4, kv_heads=2, mlp=512, vocabulary=4096, tied=False),
    batch=4,
    instruction=8,
    response=24,
    repeats=1,
)
Result = dict[str, Any]
Save = Callable[[Result], None]


def equality(device: torch.device, dry: bool, save: Save) -> Result:
    """Relative difference of each fast path from the plain one, and the most that rounding explains."""
    results: Result = {}

    def check(name: str, tolerance: float, difference: Callable[[], float]) -> None:
        try:
            value = difference()
            results[name] = {"difference": value, "at_most": tolerance, "equal": value <= tolerance}
        except Exception as error:  # an exception is the path's result, and the other paths still run
            results[name] = {"error": f"{type(error).__name__}: {error}"[:500], "equal": False}
        save(results)

    bench = step.Bench(EQUAL, device)
    engine = bench.engine("align_ti")
    check("engine and reference, float32", 1e-3, lambda: step.equality(bench)["gradient"])
    _, plain = bench.gradients(engine)

    def difference_from_plain(loss_of: Callable[[str], Callable[[], Tensor]], arm: str) -> float:
        return relative_error(bench.gradients(loss_of(arm))[1], plain)

    for arm in step.APPENDED:
        if dry and arm == "align_ti_flex":
            results[arm] = {"skipped": "FlexAttention's backward pass needs a GPU"}
        else:
            check(arm, 1e-3, partial(difference_from_plain, bench.appended, arm))
    check("drawn visual rows, none left out", 1e-6, partial(difference_from_plain, bench.engine, "align_ti_rows"))
    rows, weight = (torch.randn(n, 256, device=device).bfloat16() for n in (300, 4096))
    exact = rows.double() @ weight.double().T
    torch.set_float32_matmul_precision("high")
    check("head of bf16 operands, as stages compute it", 1e-5, lambda: relative_error([Head(weight)(rows)], [exact]))
    check("the same without gradients", 1e-5, lambda: relative_error([_without_gradients(Head(weight), rows)], [exact]))
    if device.type == "cuda":
        check(
            "out_dtype of a bf16 product",
            1e-5,
            lambda: relative_error([torch.mm(rows, weight.T, out_dtype=torch.float32)], [exact]),
        )
    for kind in ("int8", "nf4"):
        try:
            import bitsandbytes as kernels
        except ImportError as error:
            results[kind] = {"skipped": str(error)}
            continue
        check(f"{kind} layer, to its own rounding", 0.2, partial(_quantised, kernels, kind, device))
    torch.set_float32_matmul_precision("highest")
    check("compiled layers", 1e-3, lambda: relative_error(_compiled(bench, dry), plain))
    return results


def _compiled(bench: step.Bench, dry: bool) -> list[Tensor]:
    other = step.Bench(bench.size, bench.device)
    for layer in other.student.model.get_decoder().layers:
        layer.compile(dynamic=True, backend="eager" if dry else "inductor")
    return other.gradients(other.engine("align_ti"))[1]


@torch.no_grad()
def _without_gradients(head: Head, rows: Tensor) -> Tensor:
    return head(rows)


@torch.no_grad()
def _quantised(kernels: Any, kind: str, device: torch.device) -> float:
    linear = torch.nn.Linear(256, 512, bias=False, device=device, dtype=torch.bfloat16)
    quantised = (
        kernels.nn.Linear8bitLt(256, 512, bias=False, has_fp16_weights=False)
        if kind == "int8"
        else kernels.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    )
    quantised.load_state_dict({"weight": linear.weight.cpu()})
    rows = torch.randn(64, 256, device=device, dtype=torch.bfloat16)
    return relative_error([quantised.to(device)(rows)], [linear(rows)])


def steps(device: torch.device, dry: bool, _save: Save) -> Result:
    if dry:
        return step.run(EQUAL, device, repeats=1)
    memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    if memory_gib < PAPER_GIB:
        return {"skipped": f"size paper takes about {PAPER_GIB} GiB, and this device has {memory_gib:.0f}"}
    return step.run(SIZES["paper"], device, repeats=5)


def data_loading(device: torch.device, dry: bool, _save: Save) -> Result:
    return loading.run(EQUAL if dry else SIZES["small"], 2 if dry else 12, device)


def generation(device: torch.device, dry: bool, _save: Save) -> Result:
    """Greedy tokens per second of a student, alone and in batches."""
    size = EQUAL if dry else SIZES["paper"]
    dtype = size.compute_dtype
    model = llava(size.student, size.tower, device, dtype, seed=1).eval()
    bench_batch, new_tokens = step.batch(replace(size, batch=4 if dry else 32), device), 8 if dry else 64
    results: Result = {}
    for count in (1, len(bench_batch.input_ids)):
        inputs = {"input_ids": bench_batch.input_ids[:count, : size.prompt]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert bench_batch.pixel_values is not None
        pixels = bench_batch.pixel_values[:count].to(dtype)
        with torch.no_grad():
            options: Result = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
            options |= {"eos_token_id": EOS, "pad_token_id": PAD, "pixel_values": pixels, **inputs}
            model.generate(**options)
            seconds = measure.stopwatch(partial(model.generate, **options), device)
        results[f"batch of {count}"] = {"seconds": seconds, "tokens_per_second": count * new_tokens / seconds}
    return {"arms": results}


# Part -> function, share of the remaining time.
PARTS: dict[str, tuple[Callable[[torch.device, bool, Save], Result], float]] = {
    "equality": (equality, 0.5),
    "step": (steps, 0.7),
    "loading": (data_loading, 0.6),
    "generation": (generation, 1.0),
}


def failed(result: Result) -> bool:
    paths = [path for path in result.values() if isinstance(path, dict)]
    return "error" in result or not all(path.get("equal", True) for path in paths)


def main() -> None:
    parser = table.arguments("gpu", __doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on whatever device there is")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = measure.prepare()
    if device.type != "cuda" and not args.dry_run:
        parser.exit(2, "no GPU here: --dry-run tries this script on a CPU\n")
    if args.part:

        def save(result: Result) -> None:
            write_text(args.json, json.dumps(result))

        save(PARTS[args.part][0](device, args.dry_run, save))
        return
    deadline = time.monotonic() + 60 * args.minutes
    results = measure.result("gpu", "dry run" if args.dry_run else "all", "", device)
    for name, (_, share) in PARTS.items():
        results[name] = result = _process(name, args.dry_run, share * (deadline - time.monotonic()))
        print(f"{name}: {json.dumps(result, indent=1)}", flush=True)
        if args.json:
            write_text(args.json, json.dumps(results, indent=2) + "\n")
    sys.exit(any(failed(results[name]) for name in PARTS))


def _process(name: str, dry: bool, seconds: float) -> Result:
    """Result of a part, run in a process that may crash or take too long."""
    if seconds < 1:
        return {"skipped": "no time left"}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        failure: Result = {}
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--json", str(target), *["--dry-run"] * dry]
        try:
            process = subprocess.run(command, timeout=seconds, stdout=sys.stderr, check=False)
        except subprocess.TimeoutExpired:
            failure = {"cut_off": f"after {seconds:.0f} s, its share of the time"}
        else:
            if process.returncode:
                failure = {"error": f"the process ended with {process.returncode}; what it said stands above"}
        return (json.loads(target.read_text()) if target.exists() else {}) | failure


if __name__ == "__main__":
    main()
