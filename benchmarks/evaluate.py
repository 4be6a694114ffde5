"""Evaluation speed, and the overhead of the bridge to VLMEvalKit.

    python -m benchmarks.evaluate artifacts/students/align_ti/model --json benchmarks/results/evaluate-digits.json
    python -m benchmarks.evaluate artifacts/students/align_ti/model --size small --samples 16 --json ...

The same questions of the prepared split: in batches sorted by length (what the stage `evaluate` does), one by one, and through
VLMEvalKit over the served student, in turn, `--rounds` times over. The kit is then run once more with every answer known, which
says what a run costs once: its imports, files and scoring. `--size small` takes a student of that shape (benchmarks/shapes.py)
with random weights, which reads prompts and images as the student does that is named.

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
from components.evaluate.kits.client import ask
from components.models.load import load, load_processor
from components.models.template import Template, question_of
from components.process import exit_from
from components.records.paths import DATASET
from components.runtime import prepare_torch

SPENT = "ALIGNTI_BENCH_SPENT"  # environment variable of the server: file of its CPU seconds
TIMED = """
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


class Spent(NamedTuple):
    """CPU seconds so far."""

    generation: float  # inside the server
    server: float  # beside generation
    own: float  # this process
    kit: float  # ended processes of the kit


def main() -> None:
    parser = table.arguments("evaluate", __doc__)
    parser.add_argument("model", type=Path, help="a student's checkpoint folder")
    parser.add_argument("--size", choices=["digits", "small"], default="digits")
    parser.add_argument("--samples", type=int, default=250, help="questions of the split, from its start")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch, model = Path(name), asked.model
        if asked.size != "digits":
            model = random_student(SIZES[asked.size], model, scratch / "model")
        result = run(asked.size, model, asked.samples, asked.rounds, scratch)
    print(table.report(result, asked.json))


def random_student(size: Size, like: Path, folder: Path) -> Path:
    """Checkpoint folder with random weights of that shape, and the processor of the student in `like`."""
    processor = load_processor(like)
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


def run(size: str, model: Path, amount: int, rounds: int, scratch: Path) -> dict[str, Any]:
    settings = load_settings()
    device = prepare_torch(settings.runtime, seed=0)
    samples = Samples(DATASET, settings.evaluate.split)
    rows = questions(samples)[:amount]
    loaded, template, using = load(model, device), Template.asked(settings.models.template), vlmeval.kit(full=False)
    sets = export.sets(samples, rows)
    tokens, journal, spent = settings.evaluate.max_new_tokens, scratch / "answers.jsonl", scratch / "spent.json"

    def own(batch_size: int) -> None:
        chosen = settings.evaluate.model_copy(update={"batch_size": batch_size})
        answers(loaded, samples, rows, template, settings.models.max_length, chosen, f"batches of {batch_size}")

    def kit() -> None:
        vlmeval.score_split(vlmeval.Session(using, endpoint, scratch / "kit", journal, tokens), samples, sets, 0)

    def now() -> Spent:
        generating, server = json.loads(spent.read_text()) if spent.exists() else (0.0, 0.0)
        return Spent(generating, server - generating, time.process_time(), measure.children_cpu())

    serve.TRANSFORMERS = serve.TRANSFORMERS.removesuffix("main()\n") + TIMED
    os.environ[SPENT] = str(spent)
    ways: dict[str, Callable[[], None]] = {
        "batched": lambda: own(settings.evaluate.batch_size),
        "one by one": lambda: own(1),
        "vlmeval": kit,
        "vlmeval, all answers known": kit,
    }
    taken: dict[str, list[Spent]] = {way: [] for way in ways}
    with serve.served(model, "student", device.type, scratch / "server.log") as endpoint:

        def one(row: int) -> None:
            ask(endpoint, [samples[row].image or b"", question_of(samples[row].turns[0])], tokens)

        for row in rows[:3]:  # warm-up
            one(row)
        own(settings.evaluate.batch_size)
        for _ in range(rounds):
            journal.unlink(missing_ok=True)
            for way, run in ways.items():
                one(rows[0])  # updates the server's file, stale since the server idled
                before = now()
                run()
                taken[way].append(Spent(*(after - then for after, then in zip(now(), before, strict=True))))
    return measure.result("evaluate", size, f"{len(rows)} questions of the split", device) | figures(taken, len(rows))


def figures(taken: dict[str, list[Spent]], amount: int) -> dict[str, Any]:
    """Medians over rounds, and the ratios of docs/performance.md."""
    medians = {way: Spent(*map(statistics.median, zip(*rounds, strict=True))) for way, rounds in taken.items()}
    bridged, once = medians["vlmeval"], medians["vlmeval, all answers known"].kit
    client = max(0.0, bridged.kit - once)  # a few questions cost less than two starts differ by
    cpu = {way: medians[way].own for way in ("batched", "one by one")}
    arms = {way: {"seconds": found, "samples_per_second": amount / found} for way, found in cpu.items()}
    parts = {
        "generation": bridged.generation,
        "server beside it": bridged.server,
        "kit, per question": client,
        "kit, once": once,
    }
    return {
        "repeats": len(taken["vlmeval"]),
        "ratios": {
            "batched_vs_one_by_one": cpu["one by one"] / cpu["batched"],
            "bridge_overhead": (bridged.server + client) / bridged.generation,
        },
        "arms": arms | {f"vlmeval: {name}": {"seconds": s, "ms_per_question": 1000 * s / amount} for name, s in parts.items()},
    }


if __name__ == "__main__":
    exit_from(main)
