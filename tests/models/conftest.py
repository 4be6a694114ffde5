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

from components.config.models import ModelsSettings
from components.dataset.shards import ImageRow, Sample, Turn
from components.digits.tokenizer import build_processor
from components.io import sha256
from components.models.template import EOS, IMAGE, Template
from components.records.dataset import Manifest
from tests.shards import write_split

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


PLACES, COLOURS, DIGITS = ("a1", "b1", "a2", "b2"), ("red", "green"), ("one", "two", "three")
RGB = {"red": (200, 20, 20), "green": (20, 200, 20)}


def grid_row(number: int, rng: np.random.Generator) -> ImageRow:
    """A 2 x 2 grid of 8-pixel cells; a digit is a coloured bar as long as its value. Captions have three words per cell."""
    pixels = rng.integers(0, 20, (IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8)
    words, turns = [], []
    for cell, label in enumerate(PLACES):
        colour, digit = COLOURS[rng.integers(2)], int(rng.integers(-1, 3))
        if digit < 0:
            words += [label, "empty", "cell"]
            continue
        top, left = 8 * (cell // 2), 8 * (cell % 2)
        pixels[top + 2 : top + 6, left + 1 : left + 3 + 2 * digit] = RGB[colour]
        words += [label, colour, DIGITS[digit]]
        turns.append(("digit_at", f"What digit is at {label}?", DIGITS[digit]))
    turns.append(("count", "How many digits?", ["no", "one", "two", "three", "four"][len(turns)]))
    turns.append(("exist", "Is there a digit?", "yes" if len(turns) > 1 else "no"))
    turns.append(("caption", "Describe the grid.", " ".join(words)))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    name = f"train-{number:04d}"
    return ImageRow(
        name,
        buffer.getvalue(),
        tuple((f"{name}-{i}", kind, (Turn(f"{IMAGE}\n{q}", a),)) for i, (kind, q, a) in enumerate(turns)),
    )


def write_dataset(folder: Path, rows: list[ImageRow]) -> Path:
    split = write_split(folder / "train", rows, images_per_shard=50)
    digest = sha256([folder / "train"])
    count = split.samples
    Manifest(source="test", rows_in=count, rows_out=count, quarantined=0, splits={"train": split}, digest=digest).write(
        folder / "manifest.json"
    )
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset", [grid_row(i, rng) for i in range(80)])


def family(steps: int = 4) -> ModelsSettings:
    """The embedded family at a size of seconds."""
    optimiser = {
        "learning_rate": 3e-3,
        "betas": (0.9, 0.98),
        "weight_decay": 0.01,
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
    }
    training = {"steps": steps, "batch_size": 16, "optimiser": optimiser}
    language = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 64}
    return ModelsSettings.model_validate(
        {
            "family": "embedded",
            "template": {"style": "vicuna", "system": ""},
            "max_length": 160,
            "too_long": "cut",
            "refused_images": "resize",
            "image_splitting": True,
            "embedded": {
                "seed": 3,
                "tower": {"hidden": 32, "layers": 1, "heads": 2, "mlp": 64, "patch_px": PATCH_PX, "cell_px": PATCH_PX},
                "tower_training": {**training, "noise": 0.02, "label_smoothing": 0.05},
                "teachers": {"small": language, "base": {**language, "layers": 3}},
                "teacher_captions": training,
                "teacher_instructions": {**training, "turns": 3},
                "students": {"student": language},
                "student_captions": training,
            },
            "pretrained": None,
        }
    )
