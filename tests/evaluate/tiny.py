"""A tiny random LLaVA, and pictures with questions about them: built in a moment, with no network."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen3Config, SiglipVisionConfig

from components.dataset.shards import ImageRow, Turn
from components.digits.tokenizer import build_processor
from components.models.template import Template
from components.records.dataset import Manifest, SplitRecord
from components.records.paths import Split
from tests.shards import write_split
from tests.tried import keep_all

IMAGE_PX, PATCH_PX = 32, 8
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUESTIONS = {
    "digit_at": "What is at the top left?",
    "exist": "Is there a red {}?",
    "exist_at": "Is there, at the top left or in the middle, a blue {}?",
    "list": "List all.",
    "caption": "Describe it.",
}


def save_model(folder: Path, seed: int, hidden: int = 32, layers: int = 2) -> Path:
    """A random LLaVA of `hidden` width and its processor, saved as `folder`."""
    processor = build_processor([*QUESTIONS.values(), "a red, yes no", *NUMBERS], Template(""), IMAGE_PX, PATCH_PX)
    vocabulary = processor.tokenizer.get_vocab()
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
        vision_use_head=False,
        initializer_range=0.3,
    )
    language = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=hidden // 2,
        max_position_embeddings=256,
        initializer_range=0.3,  # large: answers then differ from image to image, and no near-tie decides them
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=(IMAGE_PX // PATCH_PX) ** 2,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_dataset(folder: Path, images: int, references: Mapping[str, str] = MappingProxyType({})) -> Path:
    """`val` and `test` of `images` noise pictures each, with a question of every kind; `references` overrides, by sample id."""
    splits: dict[Split, SplitRecord] = {}
    for number, split in enumerate(("val", "test")):
        rows = [_row(f"{split}{i}", number * images + i, references) for i in range(images)]
        splits[split] = write_split(folder / split, rows, images_per_shard=4)
    total = sum(record.samples for record in splits.values())
    manifest = Manifest(source="tests", rows_in=total, rows_out=total, quarantined=0, splits=splits, digest="0" * 64)
    manifest.write(folder / "manifest.json")
    keep_all(folder)
    return folder


def _row(name: str, seed: int, overridden: Mapping[str, str]) -> ImageRow:
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8)).save(file, "PNG")
    number = NUMBERS[rng.integers(10)]
    yes_no = ("yes", "no")[rng.integers(2)]
    answers = {
        "digit_at": number,
        "exist": yes_no,
        "exist_at": yes_no,
        "list": f"{number} {number}",
        "caption": f"a red {number}",
    }
    samples = tuple(
        (id_ := f"{name}-{kind}", kind, (Turn(f"<image>\n{question.format(number)}", overridden.get(id_, answers[kind])),))
        for kind, question in QUESTIONS.items()
    )
    return ImageRow(name, file.getvalue(), samples)
