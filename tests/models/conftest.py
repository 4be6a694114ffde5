"""Tiny models, processors and samples that the tests of this room share."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from components.models.template import EOS, IMAGE, Template
from components.models.tokenizer import build_processor
from components.shards import Sample, Turn

IMAGE_PX, PATCH_PX, NV = 16, 8, 4
TEXT = "what digit is at a1 a2 b1 b2 ? . , red green one two three empty list describe the grid yes no"
WORDS = TEXT.split()


def png(seed: int, px: int = IMAGE_PX) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (px, px, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sample(*turns: tuple[str, str], image: bool = True, name: str = "s0") -> Sample:
    marked = [Turn(f"{IMAGE}\n{q}" if image and i == 0 else q, a) for i, (q, a) in enumerate(turns)]
    seed = sum(name.encode())
    return Sample(name, f"image-{seed}" if image else "", "digit_at", png(seed) if image else None, tuple(marked))


def word_processor() -> LlavaProcessor:
    return build_processor([" ".join(WORDS)], Template(""), IMAGE_PX, PATCH_PX)


def bpe_processor() -> LlavaProcessor:
    """Byte-level BPE as Qwen has it: the space belongs to the following word, words fall into pieces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token=EOS, extra_special_tokens={"image_token": IMAGE}
    )
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": IMAGE_PX, "width": IMAGE_PX}),
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="full",
    )


def tiny_llava(processor: LlavaProcessor, columns: int = 0, hidden: int = 32) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    side = processor.image_processor.size["height"]
    text = Qwen2Config(
        vocab_size=columns or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=side,
        patch_size=processor.patch_size,
        vision_use_head=False,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=processor.image_token_id,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            image_seq_length=(side // processor.patch_size) ** 2,
        )
    )


def saved(folder: Path, processor: LlavaProcessor, columns: int = 0, hidden: int = 32) -> Path:
    tiny_llava(processor, columns, hidden).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["words", "bpe"])
def processor(request: pytest.FixtureRequest) -> LlavaProcessor:
    return word_processor() if request.param == "words" else bpe_processor()
