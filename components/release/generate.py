"""`alignti try`: streamed answer of one model, or of two side by side, to a question about images."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from components.align_ti.batch import Batch
from components.config.settings import Settings
from components.dataset.shards import Sample
from components.models.collate import Collator
from components.models.decoding import greedy
from components.models.families import prompt
from components.models.load import Loaded
from components.release.arguments import sample_of
from components.release.attention_overlay import compute_overlay, draw_overlays
from components.release.model import CheckpointRef, find, open_model, template_of
from components.report.markdown import counted
from components.report.terminal import printable
from components.runtime import prepare_torch

STEMS_BYTES = 120  # of the images' names in an overlay's, which a file system bounds at 255


@dataclass
class Answer:
    """Streaming answer of one model, with timings."""

    checkpoint: CheckpointRef
    text: str = ""
    state: str = "waiting"
    load_seconds: float = 0.0
    token_times: list[float] = field(default_factory=list)  # seconds from the start of generation to each token, EOS included

    @property
    def timings(self) -> str:
        """Load time, time to first token (prefill included), decoding rate of later tokens, and token count."""
        if not self.token_times:
            return self.state
        parts = [f"loaded in {self.load_seconds:.1f} s", f"first token after {1000 * self.token_times[0]:.0f} ms"]
        if len(self.token_times) > 1:
            parts.append(f"then {(len(self.token_times) - 1) / (self.token_times[-1] - self.token_times[0]):.0f} tokens/s")
        return "\n".join([*parts, counted(len(self.token_times), "token")])


class _TimedStreamer(TextStreamer):
    """Streamer that emits whole words and records the time of each token."""

    def __init__(self, tokenizer: Any, answer: Answer) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._answer = answer
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self._answer.token_times.append(time.perf_counter() - self._start)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._answer.text += text


def run(
    names: list[str], images: Sequence[Path], question: str, settings: Settings, max_new_tokens: int, overlay: bool
) -> None:
    """Print the answers of the models `names`; with `overlay` also save their attention overlays.

    Args:
        max_new_tokens: maximum answer length.

    Raises:
        InputError: no question, no such model, or an unusable image.
        ModelError, DataError: a model that does not load; a question that does not fit the template or the model.
        TryAgainError: a failed download from the hub.
    """
    sample = sample_of(images, question, settings.data.limits)
    device = prepare_torch(settings.runtime, seed=0)
    answers = [Answer(find(name, settings)) for name in names]
    console = Console()
    overlays = []
    with Live(get_renderable=lambda: _render_table(answers), console=console, refresh_per_second=12):
        for answer in answers:
            answer.state = "loading"
            start = time.perf_counter()
            loaded = open_model(answer.checkpoint.path, device)
            answer.load_seconds = time.perf_counter() - start
            answer.state = "reading"
            batch, eos_id = encode_prompt(loaded, answer.checkpoint, sample, settings)
            stream_answer(loaded, batch, eos_id, max_new_tokens, answer)
            if overlay:
                overlays.append(compute_overlay(answer.checkpoint, loaded, batch, sample, printable(answer.text)))
    if not console.is_terminal:
        console.print()  # Live prints no final newline here
    if overlay:
        stems = "-".join(image.stem for image in images).encode()[:STEMS_BYTES].decode(errors="ignore")
        models = (re.sub(r"[^\w.]+", "_", answer.checkpoint.name) for answer in answers)
        path = draw_overlays("-".join([stems, *models]), question, overlays)
        for result in overlays:
            console.print(Text(f"{result.heats[0].above}: {result.layer_reason}"))
        console.print(Text(f"-> {path}"), soft_wrap=True)


def encode_prompt(loaded: Loaded, checkpoint: CheckpointRef, sample: Sample, settings: Settings) -> tuple[Batch, int]:
    """Batch with the prompt in the model's chat template, and the EOS id. Raises DataError, ModelError."""
    collator = Collator(loaded.processor, template_of(checkpoint, loaded, settings), settings.models.max_length, train=False)
    return collator([sample]).to(loaded.model.device), collator.eos_id


def stream_answer(loaded: Loaded, batch: Batch, eos_id: int, max_new_tokens: int, answer: Answer) -> None:
    """Stream the greedy answer into `answer`, after one warm-up token."""
    inputs = prompt(loaded.model, batch)
    with greedy(loaded, 1, eos_id) as model:
        model.generate(**inputs)  # type: ignore[operator]
    with greedy(loaded, max_new_tokens, eos_id) as model:
        model.generate(**inputs, streamer=_TimedStreamer(loaded.processor.tokenizer, answer))  # type: ignore[operator]
    answer.text = answer.text.strip()


def _render_table(answers: list[Answer]) -> Table:
    table = Table(expand=True)
    for answer in answers:
        table.add_column(Text(answer.checkpoint.name), ratio=1, overflow="fold")
    table.add_row(*(Text(printable(answer.text)) for answer in answers))
    table.add_section()
    table.add_row(*(Text(answer.timings, style="dim") for answer in answers))
    return table
