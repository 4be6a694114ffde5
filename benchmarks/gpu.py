"""What a GPU has to show, in at most eight minutes and in order of worth: `python -m benchmarks.gpu --json OUT`

Each part is a process of its own with a share of the time that is left. OUT has what it found before the next begins, and of a
part that is cut off the paths that it came to. `--dry-run`: tiny shapes, on a CPU too.
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
from benchmarks.measure import apart
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
Found = dict[str, Any]
Keep = Callable[[Found], None]


def equality(device: torch.device, dry: bool, keep: Keep) -> Found:
    """Relative difference of each fast path from the plain one, and the most that rounding explains."""
    found: Found = {}

    def told(name: str, most: float, compared: Callable[[], float]) -> None:
        try:
            value = compared()
            found[name] = {"difference": value, "at_most": most, "equal": value <= most}
        except Exception as error:  # an exception is the path's result, and the other paths still run
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500], "equal": False}
        keep(found)

    bench = step.Bench(EQUAL, device)
    engine = bench.engine("align_ti")
    told("engine and reference, float32", 1e-3, lambda: step.equality(bench)["gradient"])
    _, plain = bench.gradients(engine)

    def from_plain(way: Callable[[str], Callable[[], Tensor]], arm: str) -> float:
        return apart(bench.gradients(way(arm))[1], plain)

    for arm in step.APPENDED:
        if dry and arm == "align_ti_flex":
            found[arm] = {"skipped": "FlexAttention's backward pass needs a GPU"}
        else:
            told(arm, 1e-3, partial(from_plain, bench.appended, arm))
    told("drawn visual rows, none left out", 1e-6, partial(from_plain, bench.engine, "align_ti_rows"))
    rows, weight = (torch.randn(n, 256, device=device).bfloat16() for n in (300, 4096))
    exact = rows.double() @ weight.double().T
    torch.set_float32_matmul_precision("high")
    told("head of bf16 operands, as stages compute it", 1e-5, lambda: apart([Head(weight)(rows)], [exact]))
    told("the same without gradients", 1e-5, lambda: apart([_without_gradients(Head(weight), rows)], [exact]))
    if device.type == "cuda":
        told("out_dtype of a bf16 product", 1e-5, lambda: apart([torch.mm(rows, weight.T, out_dtype=torch.float32)], [exact]))
    for form in ("int8", "nf4"):
        try:
            import bitsandbytes as kernels
        except ImportError as error:
            found[form] = {"skipped": str(error)}
            continue
        told(f"{form} layer, to its own rounding", 0.2, partial(_quantised, kernels, form, device))
    torch.set_float32_matmul_precision("highest")
    told("compiled layers", 1e-3, lambda: apart(_compiled(bench, dry), plain))
    return found


def _compiled(bench: step.Bench, dry: bool) -> list[Tensor]:
    fresh = step.Bench(bench.size, bench.device)
    for layer in fresh.student.model.get_decoder().layers:
        layer.compile(dynamic=True, backend="eager" if dry else "inductor")
    return fresh.gradients(fresh.engine("align_ti"))[1]


@torch.no_grad()
def _without_gradients(head: Head, rows: Tensor) -> Tensor:
    return head(rows)


@torch.no_grad()
def _quantised(kernels: Any, form: str, device: torch.device) -> float:
    plain = torch.nn.Linear(256, 512, bias=False, device=device, dtype=torch.bfloat16)
    made = (
        kernels.nn.Linear8bitLt(256, 512, bias=False, has_fp16_weights=False)
        if form == "int8"
        else kernels.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    )
    made.load_state_dict({"weight": plain.weight.cpu()})
    rows = torch.randn(64, 256, device=device, dtype=torch.bfloat16)
    return apart([made.to(device)(rows)], [plain(rows)])


def steps(device: torch.device, dry: bool, _keep: Keep) -> Found:
    if dry:
        return step.run(EQUAL, device, repeats=1)
    held = torch.cuda.get_device_properties(device).total_memory / 2**30
    if held < PAPER_GIB:
        return {"skipped": f"size paper takes about {PAPER_GIB} GiB, and this device has {held:.0f}"}
    return step.run(SIZES["paper"], device, repeats=5)


def waiting(device: torch.device, dry: bool, _keep: Keep) -> Found:
    return loading.run(EQUAL if dry else SIZES["small"], 2 if dry else 12, device)


def generation(device: torch.device, dry: bool, _keep: Keep) -> Found:
    """Greedy tokens per second of a student, alone and in batches."""
    size = EQUAL if dry else SIZES["paper"]
    dtype = size.compute_dtype
    model = llava(size.student, size.tower, device, dtype, seed=1).eval()
    bench_batch, new = step.batch(replace(size, batch=4 if dry else 32), device), 8 if dry else 64
    found: Found = {}
    for count in (1, len(bench_batch.input_ids)):
        given = {"input_ids": bench_batch.input_ids[:count, : size.prompt]}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        assert bench_batch.pixel_values is not None
        pixels = bench_batch.pixel_values[:count].to(dtype)
        with torch.no_grad():
            options: Found = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            options |= {"eos_token_id": EOS, "pad_token_id": PAD, "pixel_values": pixels, **given}
            model.generate(**options)
            seconds = measure.stopwatch(partial(model.generate, **options), device)
        found[f"batch of {count}"] = {"seconds": seconds, "tokens_per_second": count * new / seconds}
    return {"arms": found}


PARTS: dict[str, tuple[Callable[[torch.device, bool, Keep], Found], float]] = {  # part -> function, share of the remaining time
    "equality": (equality, 0.5),
    "step": (steps, 0.7),
    "loading": (waiting, 0.6),
    "generation": (generation, 1.0),
}


def failed(found: Found) -> bool:
    paths = [path for path in found.values() if isinstance(path, dict)]
    return "error" in found or not all(path.get("equal", True) for path in paths)


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

        def keep(found: Found) -> None:
            write_text(args.json, json.dumps(found))

        keep(PARTS[args.part][0](device, args.dry_run, keep))
        return
    ends = time.monotonic() + 60 * args.minutes
    results = measure.result("gpu", "dry run" if args.dry_run else "all", "", device)
    for name, (_, share) in PARTS.items():
        results[name] = found = _process(name, args.dry_run, share * (ends - time.monotonic()))
        print(f"{name}: {json.dumps(found, indent=1)}", flush=True)
        if args.json:
            write_text(args.json, json.dumps(results, indent=2) + "\n")
    sys.exit(any(failed(results[name]) for name in PARTS))


def _process(name: str, dry: bool, seconds: float) -> Found:
    """Result of a part, run in a process that may crash or take too long."""
    if seconds < 1:
        return {"skipped": "no time left"}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        cut: Found = {}
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--json", str(target), *["--dry-run"] * dry]
        try:
            done = subprocess.run(command, timeout=seconds, stdout=sys.stderr, check=False)
        except subprocess.TimeoutExpired:
            cut = {"cut_off": f"after {seconds:.0f} s, its share of the time"}
        else:
            if done.returncode:
                cut = {"error": f"the process ended with {done.returncode}; what it said stands above"}
        return (json.loads(target.read_text()) if target.exists() else {}) | cut


if __name__ == "__main__":
    main()
