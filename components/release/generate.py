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
from components.release.asked import sample_of
from components.release.attention_overlay import attention_of, draw_overlays
from components.release.model import Named, find, open_model, template_of
from components.runtime import prepare_torch


@dataclass
class Answer:
    """Streaming answer of one model, with timings."""

    named: Named
    text: str = ""
    state: str = "waiting"
    load_seconds: float = 0.0
    written: list[float] = field(default_factory=list)  # seconds from the start of generation to each token, EOS included

    @property
    def timings(self) -> str:
        """Load time, time to first token (prefill included), decoding rate of later tokens, and token count."""
        if not self.written:
            return self.state
        said = [f"loaded in {self.load_seconds:.1f} s", f"first token after {1000 * self.written[0]:.0f} ms"]
        if len(self.written) > 1:
            said.append(f"then {(len(self.written) - 1) / (self.written[-1] - self.written[0]):.0f} tokens/s")
        return "\n".join([*said, f"{len(self.written)} tokens"])


class _Stream(TextStreamer):
    """Streamer that emits whole words and records the time of each token."""

    def __init__(self, tokenizer: Any, answer: Answer) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._answer = answer
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self._answer.written.append(time.perf_counter() - self._start)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._answer.text += text


def run(names: list[str], images: Sequence[Path], question: str, settings: Settings, longest: int, overlay: bool) -> None:
    """Print the answers of the models `names`; with `overlay` also save their attention overlays.

    Args:
        longest: maximum answer length in tokens.

    Raises:
        InputError: no question, no such model, or an unusable image.
        ModelError, DataError: a model that does not load; a question that does not fit the template or the model.
        TryAgainError: a failed download from the hub.
    """
    sample = sample_of(images, question, settings.data.limits)
    device = prepare_torch(settings.runtime, seed=0)
    answers = [Answer(find(name, settings)) for name in names]
    console = Console()
    attended = []
    with Live(get_renderable=lambda: _columns(answers), console=console, refresh_per_second=12):
        for answer in answers:
            answer.state = "loading"
            start = time.perf_counter()
            loaded = open_model(answer.named.path, device)
            answer.load_seconds = time.perf_counter() - start
            answer.state = "reading"
            batch, eos = read(loaded, answer.named, sample, settings)
            respond(loaded, batch, eos, longest, answer)
            if overlay:
                attended.append(attention_of(answer.named, loaded, batch, sample, answer.text))
    if not console.is_terminal:
        console.print()  # Live prints no final newline here
    if overlay:
        stems, models = (image.stem for image in images), (re.sub(r"[^\w.]+", "_", answer.named.name) for answer in answers)
        path = draw_overlays("-".join([*stems, *models]), question, attended)
        for seen in attended:
            console.print(Text(f"{seen.heats[0].above}: {seen.how}"))
        console.print(Text(f"-> {path}"), soft_wrap=True)


def read(loaded: Loaded, named: Named, sample: Sample, settings: Settings) -> tuple[Batch, int]:
    """Batch with the prompt in the model's chat template, and the EOS id. Raises DataError, ModelError."""
    collator = Collator(loaded.processor, template_of(named, loaded, settings), settings.models.max_length, train=False)
    return collator([sample]).to(loaded.model.device), collator.eos_id


def respond(loaded: Loaded, batch: Batch, eos: int, longest: int, answer: Answer) -> None:
    """Stream the greedy answer into `answer`, after one warm-up token."""
    given = prompt(loaded.model, batch)
    with greedy(loaded, 1, eos) as model:
        model.generate(**given)  # type: ignore[operator]
    with greedy(loaded, longest, eos) as model:
        model.generate(**given, streamer=_Stream(loaded.processor.tokenizer, answer))  # type: ignore[operator]
    answer.text = answer.text.strip()


def _columns(answers: list[Answer]) -> Table:
    table = Table(expand=True)
    for answer in answers:
        table.add_column(Text(answer.named.name), ratio=1, overflow="fold")
    table.add_row(*(Text(answer.text) for answer in answers))
    table.add_section()
    table.add_row(*(Text(answer.timings, style="dim") for answer in answers))
    return table
