"""Tiny random models and batches for tests: two families, grouped heads, several pads, one text-only sample."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from components.align_ti.batch import Batch

IMAGE, EOS, PAD, VOCABULARY = 4, 2, 1, 40
NV = 4
LANGUAGE = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def llava(family: str = "qwen2", seed: int = 0, hidden: int = 32, layers: int = 2, vocabulary: int = VOCABULARY, **options):
    """A random LLaVA of ~30k parameters in eval mode. The spread of the weights makes its predictions peaked."""
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        vision_use_head=False,
    )
    text = LANGUAGE[family](
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **options,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=NV,
    )
    config._attn_implementation = "sdpa"
    return LlavaForConditionalGeneration(config).eval()


def batch(samples: list[tuple[int, int, int]], seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Right-padded samples, each (images 0|1, instruction tokens, response tokens including EOS)."""
    stream = torch.Generator().manual_seed(seed)
    rows = []
    for images, instruction, response in samples:
        words = torch.randint(5, VOCABULARY, (1 + instruction + response,), generator=stream).tolist()
        answer = [*words[1 + instruction : -1], EOS] if response else []
        parts = [("text", words[:1]), ("visual", [IMAGE] * NV * images), ("instruction", words[1 : 1 + instruction])]
        rows.append([(kind, token) for kind, tokens in (*parts, ("response", answer)) for token in tokens])
    longest = max(map(len, rows))

    def table(value, fill):
        return torch.tensor([[value(kind, token) for kind, token in row] + [fill] * (longest - len(row)) for row in rows])

    pixels = torch.randn(sum(images for images, _, _ in samples), 3, 16, 16, generator=stream)
    return Batch(
        ids=[f"sample-{i}" for i in range(len(samples))],
        input_ids=table(lambda kind, token: token, PAD),
        attention_mask=table(lambda kind, token: 1, 0),
        response=table(lambda kind, token: kind == "response", False),
        instruction=table(lambda kind, token: kind == "instruction", False),
        pictures=table(lambda kind, token: int(kind == "visual"), 0),
        pixel_values=pixels.to(dtype) if len(pixels) else None,
    )


def part(batch: Batch, start: int, stop: int) -> Batch:
    """Samples `start` to `stop` of a batch of at most one image each, without their edits."""
    images = [0, *batch.visual.any(1).cumsum(0).tolist()]
    pixels = None if batch.pixel_values is None else batch.pixel_values[images[start] : images[stop]]
    names = ("ids", "input_ids", "attention_mask", "response", "instruction", "pictures", "dependence")
    rows = {name: rows[start:stop] for name in names if (rows := getattr(batch, name)) is not None}
    return replace(batch, **rows, pixel_values=pixels if pixels is not None and len(pixels) else None, edits=None)
