"""Evaluation speed, and the overhead of the bridge to VLMEvalKit.

    python -m benchmarks.evaluate artifacts/students/align_ti/model --json benchmarks/results/evaluate-digits.json
    python -m benchmarks.evaluate artifacts/students/align_ti/model --size small --samples 16 --json ...

The same questions of the prepared split: in batches sorted by length (what the stage `evaluate` does), one by one, and through
VLMEvalKit over the served student, in turn, `--rounds` times over. The kit is then run once more with every answer cached: the
fixed cost of a run, its imports, files and scoring. `--size small` builds a student of that shape (benchmarks/shapes.py) with
random weights and the processor of the named student.

The bridge's overhead is all that is spent beside generation itself, which is measured inside the server: HTTP, data URLs, the
processor, the kit. In CPU time, which other programs hardly lengthen; what overlaps with generation counts all the same.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import measure, table
from benchmarks.shapes import SIZES, Size, llava
from components.config.load import load_settings
from components.dataset.shards import Samples
from components.evaluate.generate import answers, questions
from components.evaluate.kits import export, serve, vlmeval
from components.evaluate.kits.client import chat_completion
from components.models.load import load, load_processor
from components.models.rendered import question_of
from components.models.template import Template
from components.process import exit_from
from components.records.paths import DATASET
from components.runtime import prepare_torch

CPU_FILE = "ALIGNTI_BENCH_SPENT"  # environment variable of the server: file of its CPU seconds
TIMED_GENERATE = """
import json, time
from transformers import LlavaForConditionalGeneration as Model
generate, spent = Model.generate, 0.0
def timed(*args, **kwargs):
    global spent
    started = time.thread_time()
    try:
        return generate(*args, **kwargs)
    finally:
        spent += time.thread_time() - started
        with open(os.environ["ALIGNTI_BENCH_SPENT"], "w") as file:
            json.dump([spent, time.process_time()], file)
Model.generate = timed
main()
"""  # replaces the server's last line


class CpuSeconds(NamedTuple):
    """CPU seconds so far."""

    generation: float  # inside the server
    server: float  # beside generation
    process: float  # this process
    kit: float  # ended processes of the kit


def main() -> None:
    parser = table.arguments("evaluate", __doc__)
    parser.add_argument("model", type=Path, help="a student's checkpoint folder")
    parser.add_argument("--size", choices=["digits", "small"], default="digits")
    parser.add_argument("--samples", type=int, default=250, help="questions of the split, from its start")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work_dir, model = Path(name), args.model
        if args.size != "digits":
            model = random_student(SIZES[args.size], model, work_dir / "model")
        result = run(args.size, model, args.samples, args.rounds, work_dir)
    print(table.report(result, args.json))


def random_student(size: Size, reference: Path, folder: Path) -> Path:
    """Checkpoint folder with random weights of that shape, and the processor of the student in `reference`."""
    processor = load_processor(reference)
    tokenizer = processor.tokenizer
    processor.image_processor.size = {"height": size.tower.image_px, "width": size.tower.image_px}
    processor.patch_size = size.tower.patch_px
    model = llava(size.student, size.tower, torch.device("cpu"), torch.float32, seed=0)
    model.config.image_token_index = tokenizer.convert_tokens_to_ids(processor.image_token)
    for config in (model.config.text_config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(size: str, model: Path, amount: int, rounds: int, work_dir: Path) -> dict[str, Any]:
    settings = load_settings()
    device = prepare_torch(settings.runtime, seed=0)
    samples = Samples(DATASET, settings.evaluate.split)
    rows = questions(samples)[:amount]
    loaded, template, light_kit = load(model, device), Template.from_settings(settings.models.template), vlmeval.kit(full=False)
    sets = export.sets(samples, rows)
    max_new_tokens, journal, cpu_file = settings.evaluate.max_new_tokens, work_dir / "answers.jsonl", work_dir / "spent.json"

    def generate(batch_size: int) -> None:
        evaluate_settings = settings.evaluate.model_copy(update={"batch_size": batch_size})
        answers(loaded, samples, rows, template, settings.models.max_length, evaluate_settings, f"batches of {batch_size}")

    def run_kit() -> None:
        vlmeval.score_split(vlmeval.Session(light_kit, endpoint, work_dir / "kit", journal, max_new_tokens), samples, sets, 0)

    def cpu_seconds() -> CpuSeconds:
        generation, server = json.loads(cpu_file.read_text()) if cpu_file.exists() else (0.0, 0.0)
        return CpuSeconds(generation, server - generation, time.process_time(), measure.children_cpu())

    serve.TRANSFORMERS = serve.TRANSFORMERS.removesuffix("main()\n") + TIMED_GENERATE
    os.environ[CPU_FILE] = str(cpu_file)
    arms: dict[str, Callable[[], None]] = {
        "batched": lambda: generate(settings.evaluate.batch_size),
        "one by one": lambda: generate(1),
        "vlmeval": run_kit,
        "vlmeval, all answers known": run_kit,
    }
    rounds_by_arm: dict[str, list[CpuSeconds]] = {arm: [] for arm in arms}
    with serve.served(model, "student", device.type, work_dir / "server.log") as (endpoint, _):

        def ask_question(row: int) -> None:
            chat_completion(endpoint, [samples[row].image or b"", question_of(samples[row].turns[0])], max_new_tokens)

        for row in rows[:3]:  # warm-up
            ask_question(row)
        generate(settings.evaluate.batch_size)
        for _ in range(rounds):
            journal.unlink(missing_ok=True)
            for arm, work in arms.items():
                ask_question(rows[0])  # updates the server's file, stale since the server idled
                start = cpu_seconds()
                work()
                rounds_by_arm[arm].append(
                    CpuSeconds(*(later - earlier for later, earlier in zip(cpu_seconds(), start, strict=True)))
                )
    return measure.result("evaluate", size, f"{len(rows)} questions of the split", device) | figures(rounds_by_arm, len(rows))


def figures(rounds_by_arm: dict[str, list[CpuSeconds]], amount: int) -> dict[str, Any]:
    """Medians over rounds, and the ratios of docs/performance.md."""
    medians = {arm: CpuSeconds(*map(statistics.median, zip(*rounds, strict=True))) for arm, rounds in rounds_by_arm.items()}
    bridge, kit_once = medians["vlmeval"], medians["vlmeval, all answers known"].kit
    client = max(0.0, bridge.kit - kit_once)  # a few questions cost less than two starts differ by
    cpu = {arm: medians[arm].process for arm in ("batched", "one by one")}
    arms = {arm: {"seconds": seconds, "samples_per_second": amount / seconds} for arm, seconds in cpu.items()}
    parts = {
        "generation": bridge.generation,
        "server beside it": bridge.server,
        "kit, per question": client,
        "kit, once": kit_once,
    }
    return {
        "repeats": len(rounds_by_arm["vlmeval"]),
        "ratios": {
            "batched_vs_one_by_one": cpu["one by one"] / cpu["batched"],
            "bridge_overhead": (bridge.server + client) / bridge.generation,
        },
        "arms": arms
        | {
            f"vlmeval: {name}": {"seconds": seconds, "ms_per_question": 1000 * seconds / amount}
            for name, seconds in parts.items()
        },
    }


if __name__ == "__main__":
    exit_from(main)
