"""How fast students are evaluated: `python -m benchmarks.evaluate artifacts/students/align_ti/model [--samples N] [--json OUT]`

The same questions of the prepared split four times, in turn, `--rounds` times over: in batches sorted by length (what the stage
`evaluate` does), one by one, one by one through the served student, and through VLMEvalKit. Says the medians and their ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from components.artifacts import DATASET, write_text
from components.errors import exit_from
from components.evaluate.generate import answers, questions
from components.evaluate.kits import export, vlmeval
from components.evaluate.kits.client import Endpoint, ask
from components.evaluate.kits.serve import served
from components.models.load import load
from components.models.template import Template, question_of
from components.runtime import prepare_torch
from components.settings import load_settings
from components.shards import Samples


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description="Samples per second of each way.")
    parser.add_argument("model", type=Path, help="a student's checkpoint folder")
    parser.add_argument("--samples", type=int, default=250, help="questions of the split, from its start")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(asked.model, asked.samples, asked.rounds, Path(scratch))
    text = json.dumps(figures, indent=2)
    print(text)
    if asked.json:
        write_text(asked.json, text + "\n")


def measure(model: Path, amount: int, rounds: int, scratch: Path) -> dict[str, float]:
    """Seconds per way (medians over rounds), and the ratios that docs/performance.md speaks of."""
    settings = load_settings()
    device = prepare_torch(settings.runtime, seed=0)
    samples = Samples(DATASET, settings.evaluate.split)
    rows = questions(samples)[:amount]
    loaded, template, using = load(model, device), Template.asked(settings.models.template), vlmeval.kit(full=False)

    def own(batch_size: int) -> None:
        chosen = settings.evaluate.model_copy(update={"batch_size": batch_size})
        answers(loaded, samples, rows, template, settings.models.max_length, chosen, f"batches of {batch_size}")

    with served(model, device.type, scratch / "server.log") as endpoint:
        ways: dict[str, Callable[[], None]] = {
            "batched": lambda: own(settings.evaluate.batch_size),
            "one_by_one": lambda: own(1),
            "served": lambda: _served(endpoint, samples, rows, settings.evaluate.max_new_tokens),
            "vlmeval": lambda: _kit(using, endpoint, samples, rows, settings.evaluate.max_new_tokens, scratch),
        }
        _served(endpoint, samples, rows[:5], settings.evaluate.max_new_tokens)  # its first answers are slow
        own(settings.evaluate.batch_size)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, run in ways.items():
                started = time.perf_counter()
                run()
                seconds[way].append(time.perf_counter() - started)
    median = {way: statistics.median(found) for way, found in seconds.items()}
    return {
        "samples": len(rows),
        "rounds": rounds,
        **{f"seconds_{way}": round(found, 3) for way, found in median.items()},
        "batched_over_one_by_one": round(median["one_by_one"] / median["batched"], 2),  # samples/s
        "served_over_one_by_one": round(median["served"] / median["one_by_one"], 3),  # time: HTTP, PNG, template
        "vlmeval_over_served": round(median["vlmeval"] / median["served"], 3),  # its imports, files, scoring
    }


def _served(endpoint: Endpoint, samples: Samples, rows: Sequence[int], new_tokens: int) -> None:
    for sample in (samples[row] for row in rows):
        images = [] if sample.image is None else [sample.image]
        ask(endpoint, question_of(sample.turns[0]), images, new_tokens)


def _kit(using: vlmeval.Kit, endpoint: Endpoint, samples: Samples, rows: Sequence[int], new_tokens: int, scratch: Path) -> None:
    journal = scratch / "answers.jsonl"
    journal.unlink(missing_ok=True)
    found, _ = export.sets(samples, rows)
    vlmeval.score_split(using, endpoint, samples, found, scratch / "kit", journal, new_tokens)


if __name__ == "__main__":
    exit_from(main)
