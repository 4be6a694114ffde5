"""Every family at toy size: its own configuration, model, processor and chat template, with random weights.

Sizes are the smallest that keep what makes a family differ: CLIP's class token, tiles of several shapes, three axes of
positions, features that enter several layers, windows shorter than a sample, image tokens that see each other.
"""

from __future__ import annotations

import atexit
import io
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from components.align_ti.batch import Batch
from components.dataset.shards import Sample, Turn
from components.models.collate import Collator
from components.models.load import Loaded, load
from components.models.processor import images_only
from components.models.template import IMAGE, Template

WORDS = "what digit is at a1 a2 b1 b2 ? . , red green one two three empty list describe the grid yes no user model assistant"
LAYERS = [2]  # of the language model that is built next
GRID = [[16, 32], [32, 16], [32, 32]]  # LLaVA-NeXT's and -OneVision's resolutions: (height, width)


def tokenizer(pad: str, eos: str, bos: str | None = None, special: tuple[str, ...] = (), **named: str) -> Any:
    """Byte-level BPE with the family's own special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [WORDS] * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    wrapped = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        extra_special_tokens=dict(named),
        padding_side="right",
    )
    wrapped.add_tokens(list(special), special_tokens=True)
    return wrapped


def text_shape(tok: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tok) + 8 * (LAYERS[0] - 1),  # padded heads, larger models' more, as released ones are
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS[0],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
        **more,
    }


VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def siglip(px: int, **more: Any) -> Any:
    return tf.SiglipVisionConfig(**{**VISION, "image_size": px, "patch_size": 8, "vision_use_head": False, **more})


def llava() -> tuple[Any, Any]:
    """LLaVA-1.5: CLIP's layer -2 without its class token; Llama."""
    tok = tokenizer("<pad>", "</s>", "<s>", image_token="<image>")
    vision = tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**text_shape(tok)),
        image_token_index=tok.image_token_id,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=4,
    )
    pixels = tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = tf.LlavaProcessor(
        image_processor=pixels,
        tokenizer=tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return tf.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    """LLaVA-NeXT: the image and its tiles, without the padding of either; Qwen2."""
    tok = tokenizer("<pad>", "<|im_end|>", special=("<|im_start|>",), image_token="<image>")
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8),
        text_config=tf.Qwen2Config(**text_shape(tok)),
        image_token_index=tok.image_token_id,
        image_grid_pinpoints=GRID,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=4,
    )
    pixels = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=GRID
    )
    processor = tf.LlavaNextProcessor(
        image_processor=pixels,
        tokenizer=tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    return tf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    tok = tokenizer("<pad>", "<|im_end|>", special=("<|im_start|>",), image_token="<image>", video_token="<video>")
    config = tf.LlavaOnevisionConfig(
        vision_config=siglip(16),
        text_config=tf.Qwen2Config(**text_shape(tok)),
        image_token_index=tok.image_token_id,
        video_token_index=tok.video_token_id,
        image_grid_pinpoints=GRID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_9",
    )
    pixels = tf.LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=GRID)
    processor = images_only(tf.LlavaOnevisionProcessor)(
        pixels,
        tok,
        None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen(kind: str, vision: dict[str, Any], text: dict[str, Any], patch: int) -> tuple[Any, Any]:
    tok = tokenizer(
        "<|endoftext|>",
        "<|im_end|>",
        special=("<|im_start|>", "<|vision_start|>", "<|vision_end|>"),
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )
    ids = {
        "image_token_id": tok.image_token_id,
        "video_token_id": tok.video_token_id,
        "vision_start_token_id": tok.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tok.convert_tokens_to_ids("<|vision_end|>"),
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **text.pop("rope", {})}
    config_class = getattr(tf, f"{kind}Config")
    config = config_class(vision_config=vision, text_config={**text_shape(tok), "rope_parameters": rope, **text}, **ids)
    pixels = tf.Qwen2VLImageProcessorPil(
        size={"shortest_edge": (2 * patch) ** 2, "longest_edge": 8 * (2 * patch) ** 2}, patch_size=patch, merge_size=2
    )
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = images_only(getattr(tf, f"{kind}Processor"))(pixels, tok, None, chat_template=template)
    return getattr(tf, f"{kind}ForConditionalGeneration")(config), processor


def qwen2_vl() -> tuple[Any, Any]:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return _qwen("Qwen2VL", vision, {}, 4)


def qwen2_5_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return _qwen("Qwen2_5_VL", vision, {}, 4)


def qwen3_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    return _qwen("Qwen3VL", vision, {"num_hidden_layers": LAYERS[0] + 1, "rope": {"mrope_interleaved": True}}, 4)


def internvl() -> tuple[Any, Any]:
    """InternVL 3 and 3.5: tiles beside a thumbnail, pixel shuffle by two; Qwen2 or Qwen3."""
    tok = tokenizer(
        "<|endoftext|>",
        "<|im_end|>",
        special=("<|im_start|>",),
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    vision = tf.InternVLVisionConfig(**VISION, image_size=[16, 16], patch_size=[4, 4])
    config = tf.InternVLConfig(
        vision_config=vision,
        text_config=tf.Qwen3Config(**text_shape(tok)),
        image_token_id=tok.context_image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    pixels = tf.GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4)
    template = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    processor = images_only(tf.InternVLProcessor)(pixels, tok, None, image_seq_length=4, chat_template=template)
    return tf.InternVLForConditionalGeneration(config), processor


IDEFICS_CHAT = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize + ':' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ ' ' + c['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _idefics(kind: str, build_processor: Callable[..., Any], px: int = 16) -> tuple[Any, Any]:
    """Tiles of `px` pixels, a token for each 8 x 8 of them."""
    rows = tuple(f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4))
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tok = tokenizer("<|endoftext|>", "<end_of_utterance>", "<|im_start|>", rows, **named)
    vision = getattr(tf, f"{kind}VisionConfig")(**VISION, image_size=px, patch_size=4)
    config = getattr(tf, f"{kind}Config")(
        vision_config=vision,
        text_config=tf.LlamaConfig(**text_shape(tok)),
        image_token_id=tok.image_token_id,
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
    )
    pixels = getattr(tf, f"{kind}ImageProcessorPil")(size={"longest_edge": 2 * px}, max_image_size={"longest_edge": px})
    processor = build_processor(pixels, tok, image_seq_len=(px // 8) ** 2, chat_template=IDEFICS_CHAT)
    return getattr(tf, f"{kind}ForConditionalGeneration")(config), processor


def idefics3() -> tuple[Any, Any]:
    return _idefics("Idefics3", tf.Idefics3Processor)


def smolvlm(px: int = 16) -> tuple[Any, Any]:
    return _idefics("SmolVLM", partial(images_only(tf.SmolVLMProcessor), video_processor=None), px)


GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] | replace('assistant', 'model') + '\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma3() -> tuple[Any, Any]:
    """Gemma 3: layers with a window beside full ones; an image's tokens see each other."""
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tok = tokenizer("<pad>", "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>"), **named)
    text = tf.Gemma3TextConfig(
        **text_shape(tok),
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"][: LAYERS[0]],
        query_pre_attn_scalar=8,
    )
    config = tf.Gemma3Config(
        vision_config=siglip(32),
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
        image_token_index=tok.image_token_id,
    )
    pixels = tf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = tf.Gemma3Processor(pixels, tok, image_seq_length=4, chat_template=GEMMA_CHAT)
    model = tf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # a new one's is 0
    return model, processor


def paligemma() -> tuple[Any, Any]:
    """PaliGemma 2: what stands before the answer sees all of itself; Gemma 2, whose layers alternate and cap their scores."""
    tok = tokenizer("<pad>", "<eos>", "<bos>", image_token="<image>")
    pixels = tf.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    pixels.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(pixels, tok)
    text = tf.Gemma2Config(**text_shape(tok), sliding_window=6, query_pre_attn_scalar=8)
    config = tf.PaliGemmaConfig(
        vision_config=siglip(16, projection_dim=32), text_config=text, image_token_index=tok.image_token_id, projection_dim=32
    )
    return tf.PaliGemmaForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "paligemma": paligemma,
}


def save(family: str, folder: Path, seed: int = 0, layers: int = 2, **shape: int) -> Path:
    """The family's model and processor as a hub-style folder; its language model has so many layers."""
    torch.manual_seed(seed)
    LAYERS[0] = layers
    model, processor = FAMILIES[family](**shape)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@cache
def folder(family: str, seed: int = 0, layers: int = 2) -> Path:
    """One folder of the family for all tests of a process."""
    path = Path(tempfile.mkdtemp(prefix=f"{family}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return save(family, path / family, seed, layers)


@cache
def loaded(family: str) -> Loaded:
    """As `family: pretrained` opens it, in float64 and shared by tests: not to be changed."""
    return load(folder(family), "cpu", torch.float64)


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width: int, height: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    image(width, height, seed).save(buffer, "PNG")
    return buffer.getvalue()


def sample(name: str, answer: str, size: tuple[int, int] | None, turns: int = 1) -> Sample:
    questions = [Turn(f"{IMAGE}\nwhat digit ?" if size and i == 0 else "is a1 red ?", answer) for i in range(turns)]
    return Sample(
        name, f"image-{name}" if size else "", "digit_at", png(*size, sum(name.encode())) if size else None, tuple(questions)
    )


SAMPLES = (
    sample("wide", "red one", (40, 20)),
    sample("none", "no", None),
    sample("small", "two , green three", (16, 16), turns=2),
    replace(
        sample("several", "red", (20, 40)),
        turns=(Turn(f"{IMAGE}{IMAGE}\nwhat digit ?", "red"), Turn(f"is {IMAGE} red ?", "no , green")),
        more=(png(16, 16, 7), png(40, 20, 8)),
    ),
)


@cache
def collator(family: str, train: bool = True, style: Literal["vicuna", "processor"] = "vicuna") -> Collator:
    return Collator(loaded(family).processor, Template("", style=style), 400, train=train)


def batch(family: str, samples: Sequence[Sample] = SAMPLES) -> Batch:
    """Collated, its pixels in float64: images of two shapes, a sample without one, one of two turns."""
    collated = collator(family)(samples)
    pixels = collated.pixel_values
    return replace(collated, pixel_values=None if pixels is None else pixels.double())


@cache
def alone(family: str, row: int, turns: int | None = None) -> Batch:
    """The batch of one of SAMPLES, of its first turns alone."""
    return batch(family, [SAMPLES[row].upto(turns or len(SAMPLES[row].turns))])
