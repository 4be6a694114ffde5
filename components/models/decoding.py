"""Greedy decoding for `generate`, until EOS; a logits processor may leave another token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationConfig

from components.models.load import Loaded


@contextmanager
def greedy(loaded: Loaded, max_new_tokens: int, eos: int) -> Iterator[nn.Module]:
    """Greedy decoding; the checkpoint's generation_config (a repetition penalty, say) is ignored."""
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    checkpoint_config = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({eos, tokenizer.eos_token_id}),
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        with torch.no_grad():
            yield model
    finally:
        model.generation_config = checkpoint_config
