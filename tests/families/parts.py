"""The parts that the paper's models are made of, at toy size with random weights: SigLIP and Qwen folders like the hub's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.families.toy import VISION, WORDS, siglip

PX = 16  # 2 x 2 patches
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def siglip_folder(folder: Path, with_text: bool = True, seed: int = 0) -> Path:
    """As google/siglip-so400m-patch14-384 is: text and vision, a pooling head, a SiglipProcessor; or its vision half."""
    torch.manual_seed(seed)
    vision = siglip(PX, vision_use_head=True, num_hidden_layers=3).to_dict()
    text = {**VISION, "vocab_size": 40, "max_position_embeddings": 8}
    model = tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=vision))
    (model if with_text else tf.SiglipVisionModel(tf.SiglipVisionConfig(**vision))).save_pretrained(folder)
    tf.SiglipImageProcessorPil(size={"height": PX, "width": PX}).save_pretrained(folder)
    (folder / "LICENSE").write_text("Apache-2.0")
    return folder


def qwen_tokenizer(eos: str, special: tuple[str, ...]) -> Any:
    """Byte-level BPE of Qwen's own class, whose padding is <|endoftext|>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([WORDS] * 3, trainer)
    learnt = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = tf.Qwen2Tokenizer(
        vocab=learnt["vocab"] | {token: len(learnt["vocab"]) + i for i, token in enumerate(special)},
        merges=merges,
        eos_token=eos,
        pad_token="<|endoftext|>",
        unk_token=None,
    )
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def qwen_folder(
    folder: Path,
    kind: Literal["qwen2", "qwen3"] = "qwen2",
    chat: bool = False,
    spare: int = 8,
    tied: bool = False,
    hidden: int = 32,
    pads: tuple[str, ...] = ("<|vision_pad|>",),
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A base model, whose answers end with <|endoftext|>, or a `chat` model, whose end with <|im_end|>.

    Args:
        spare: rows of the vocabulary beyond the tokenizer's: Qwen pads its heads.
        pads: special tokens that Qwen2 did not have yet.
    """
    torch.manual_seed(hidden)
    tokenizer = qwen_tokenizer("<|im_end|>" if chat else "<|endoftext|>", (*SPECIAL, *pads))
    config = {"qwen2": tf.Qwen2Config, "qwen3": tf.Qwen3Config}[kind](
        vocab_size=len(tokenizer) + spare,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.eos_token_id,
    )
    model: Any = {"qwen2": tf.Qwen2ForCausalLM, "qwen3": tf.Qwen3ForCausalLM}[kind](config).to(dtype)
    model.generation_config = tf.GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
