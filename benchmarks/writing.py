"""Generation of 32-token answers by a student in training, ours (GKD) and TRL 1.16.0's: `python -m benchmarks.writing`

One tiny model and batch of prompts, drawn at temperature 1 with a key/value cache. Ours draws each token by its sample's key.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import measure, peer
from benchmarks.shapes import EOS, IMAGE, SIZES
from benchmarks.step import Bench
from components.models.writing import Writer

TOKENS = 32


def main() -> None:
    device = measure.prepare()
    bench = Bench(SIZES["tiny"], device)
    model, length = bench.student.model, bench.size.prompt
    samples: Any = [SimpleNamespace(turns=[None]) for _ in bench.keys]
    trainer = peer.trainer(bench)
    trainer.generation_config.max_new_tokens = TOKENS
    prompt_tensors = {
        name: getattr(bench.batch, name)[:, :length] for name in ("input_ids", "attention_mask", "response", "visual")
    }
    prompts = SimpleNamespace(**prompt_tensors, pixel_values=bench.batch.pixel_values, image_inputs={})
    prompts.to = lambda _device: prompts
    tokenizer = trainer.processing_class
    loaded: Any = SimpleNamespace(
        model=model,
        processor=SimpleNamespace(tokenizer=tokenizer, image_token_id=IMAGE),
        vocabulary=bench.size.student.vocabulary,
    )
    collator: Any = SimpleNamespace(eos_id=EOS, max_length=10**6, of_prompts=lambda _samples, _before: prompts)
    writer = Writer(loaded, collator, TOKENS, 1.0, None, loaded.vocabulary)
    counts: dict[str, int] = {}

    def ours() -> None:
        counts["gkd"] = sum(len(answer.tokens) for (answer,) in writer.write(samples, bench.keys))

    def trl() -> None:
        torch.manual_seed(0)
        ids = prompts.input_ids.tolist()
        counts["trl"] = sum(map(len, trainer._generate_single_turn(ids, None, {"pixel_values": prompts.pixel_values})))

    ours()
    trl()
    timed = measure.compare_arms({"gkd": ours, "trl": trl}, 15, device, "writing", {"gkd_vs_trl": ("trl", "gkd")})
    for name, arm in timed["arms"].items():
        print(f"{name}: {counts[name]} tokens, {counts[name] / arm['seconds']:,.0f} tokens/s, {arm['seconds']:.3f} s a batch")
    print(f"seconds of TRL's over ours: {timed['ratios']['gkd_vs_trl']:.2f}, quartiles {timed['quartiles']['gkd_vs_trl']}")


if __name__ == "__main__":
    main()
