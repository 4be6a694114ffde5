"""Model shapes: of the recipes' models, for estimates before any download, and of any downloaded checkpoint.

The numbers are those of each repository's config.json at the revision that the recipes pin. `tests/cost/test_shapes.py`
compares the parameter counts that follow with the published sizes of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Tower:
    """Vision transformer. `window`: patches that one patch attends to; None: all of its image or tile."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    image_px: int
    patch_px: int
    gated: bool = False
    window: int | None = None

    @property
    def tokens(self) -> int:
        """Patches of one image or tile of `image_px`."""
        return (self.image_px // self.patch_px) ** 2

    @property
    def per_layer(self) -> int:
        return 4 * self.hidden**2 + (3 if self.gated else 2) * self.hidden * self.mlp

    @property
    def weights(self) -> int:
        return self.layers * self.per_layer + (3 * self.patch_px**2 + self.tokens) * self.hidden


@dataclass(frozen=True)
class Language:
    """Llama- or Qwen-shaped language model. `head_dim`: None for `hidden` / `heads`."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = True
    head_dim: int | None = None

    @property
    def attention(self) -> int:
        """Width of all query heads."""
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def per_layer(self) -> int:
        keys_and_values = 2 * self.attention * self.kv_heads // self.heads
        return self.hidden * (2 * self.attention + keys_and_values) + 3 * self.hidden * self.mlp

    @property
    def weights(self) -> int:
        return self.layers * self.per_layer + (1 if self.tied else 2) * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Model:
    """Vision-language model, with its token counts for one image.

    Args:
        projector: weights between tower and language model, each used once per visual token.
        patches: patches of one image in the tower, over all tiles.
        visual: visual tokens of one image in the language model (Nv).
    """

    tower: Tower
    language: Language
    projector: int
    patches: int
    visual: int

    @property
    def weights(self) -> int:
        return self.tower.weights + self.projector + self.language.weights


IMAGE = (640, 480)  # pixels of the assumed image, where the number of visual tokens depends on it

SIGLIP = Tower(hidden=1152, layers=27, heads=16, mlp=4304, image_px=384, patch_px=14)
_SIGLIP_26 = replace(SIGLIP, layers=26)  # without the last, which LLaVA-OneVision does not read
_QWEN_VIT = Tower(hidden=1280, layers=32, heads=16, mlp=3420, image_px=384, patch_px=14, gated=True, window=251)
_QWEN3_VIT = Tower(hidden=1152, layers=27, heads=16, mlp=4304, image_px=768, patch_px=16, window=1200)
_QWEN3_VIT_SMALL = Tower(hidden=1024, layers=24, heads=16, mlp=4096, image_px=768, patch_px=16, window=1200)
_SIGLIP_512 = Tower(hidden=768, layers=12, heads=12, mlp=3072, image_px=512, patch_px=16)

_QWEN2_0_5B = Language(hidden=896, layers=24, heads=14, kv_heads=2, mlp=4864, vocabulary=151_936)
_QWEN2_7B = Language(hidden=3584, layers=28, heads=28, kv_heads=4, mlp=18_944, vocabulary=152_064, tied=False)
_QWEN3_1_7B = Language(hidden=2048, layers=28, heads=16, kv_heads=8, mlp=6144, vocabulary=151_936, head_dim=128)
_QWEN3_8B = Language(hidden=4096, layers=36, heads=32, kv_heads=8, mlp=12_288, vocabulary=151_936, tied=False, head_dim=128)

LANGUAGE_MODELS = {
    "Qwen/Qwen2.5-0.5B": _QWEN2_0_5B,
    "Qwen/Qwen2.5-1.5B": Language(hidden=1536, layers=28, heads=12, kv_heads=2, mlp=8960, vocabulary=151_936),
    "Qwen/Qwen2.5-7B": _QWEN2_7B,
    "Qwen/Qwen3-0.6B": Language(hidden=1024, layers=28, heads=16, kv_heads=8, mlp=3072, vocabulary=151_936, head_dim=128),
    "Qwen/Qwen3-1.7B": _QWEN3_1_7B,
    "Qwen/Qwen3-8B": _QWEN3_8B,
}
TOWERS = {"google/siglip-so400m-patch14-384": SIGLIP}


def llava(tower: Tower, language: Language) -> Model:
    """LLaVA-1.5: two-layer projector, a visual token per patch."""
    return Model(tower, language, (tower.hidden + language.hidden) * language.hidden, tower.tokens, tower.tokens)


def _merged(tower: Tower, language: Language, mergers: int, visual: int) -> Model:
    """Qwen-VL: 2 x 2 patches merged by two linear layers; Qwen3-VL does so after three more layers of the tower."""
    wide = 4 * tower.hidden
    return Model(tower, language, mergers * (wide + language.hidden) * wide, patches=4 * visual, visual=visual)


def _shuffled(tower: Tower, language: Language, side: int) -> Model:
    """Idefics3: pixel shuffle of side x side patches into one token, one linear layer; one tile."""
    return Model(tower, language, side**2 * tower.hidden * language.hidden, tower.tokens, tower.tokens // side**2)


def _tiled(tower: Tower, language: Language) -> Model:
    """LLaVA-OneVision: IMAGE whole and in 2 x 2 tiles without their padding, with a newline token per row."""
    return replace(llava(tower, language), patches=5 * tower.tokens, visual=tower.tokens + 40 * (54 + 1))


MODELS = {
    "Qwen/Qwen2.5-VL-7B-Instruct": _merged(_QWEN_VIT, _QWEN2_7B, mergers=1, visual=23 * 17),
    "Qwen/Qwen2.5-VL-3B-Instruct": _merged(
        _QWEN_VIT,
        Language(hidden=2048, layers=36, heads=16, kv_heads=2, mlp=11_008, vocabulary=151_936),
        mergers=1,
        visual=23 * 17,
    ),
    "Qwen/Qwen3-VL-8B-Instruct": _merged(_QWEN3_VIT, _QWEN3_8B, mergers=4, visual=20 * 15),
    "Qwen/Qwen3-VL-2B-Instruct": _merged(_QWEN3_VIT_SMALL, _QWEN3_1_7B, mergers=4, visual=20 * 15),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": _shuffled(
        SIGLIP, Language(hidden=2048, layers=24, heads=32, kv_heads=32, mlp=8192, vocabulary=49_280, tied=False), side=3
    ),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": _shuffled(
        _SIGLIP_512, Language(hidden=960, layers=32, heads=15, kv_heads=5, mlp=2560, vocabulary=49_280, tied=False), side=4
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _tiled(_SIGLIP_26, replace(_QWEN2_7B, vocabulary=152_128)),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": _tiled(_SIGLIP_26, replace(_QWEN2_0_5B, vocabulary=152_000)),
}

# Download sizes other than 16 bits per counted weight: SigLIP includes its text encoder, in float32; Qwen3's
# small checkpoints store their tied head twice; SmolVLM2's smaller one is in float32.
DOWNLOADS = {
    "google/siglip-so400m-patch14-384": 3.51e9,
    "Qwen/Qwen3-0.6B": 1_503_300_328,
    "Qwen/Qwen3-1.7B": 4.06e9,
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": 2.03e9,
}


def download_bytes(source: str) -> float | None:
    """Approximate download in bytes; None for an unknown repository."""
    model = MODELS.get(source) or LANGUAGE_MODELS.get(source) or TOWERS.get(source)
    return DOWNLOADS.get(source, None if model is None else 2.0 * model.weights)


# Licences on the model cards; none of these repositories is gated.
LICENCES = dict.fromkeys([*MODELS, *LANGUAGE_MODELS, *TOWERS], "Apache 2.0") | {
    "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen Research Licence, not for commercial use"
}


def load_shape(folder: Path) -> Model | None:
    """Shape from the folder's config.json; None for an unsupported family."""
    from components.models.checkpoint_folder import as_model_error, config_of

    with as_model_error(f"{folder}: its config.json cannot be read"):
        config = config_of(folder)
    vision: Any = getattr(config, "vision_config", None)
    build: Any = {
        "llava": llava,
        "llava_onevision": _tiled,
        "qwen2_5_vl": lambda tower, text: _merged(tower, text, 1, _native(vision)),
        "qwen3_vl": lambda tower, text: _merged(tower, text, 1 + len(vision.deepstack_visual_indexes), _native(vision)),
        "idefics3": lambda tower, text: _shuffled(tower, text, config.scale_factor),
        "smolvlm": lambda tower, text: _shuffled(tower, text, config.scale_factor),
    }.get(config.model_type)
    if build is None:
        return None
    text = config.get_text_config()
    language = Language(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        mlp=text.intermediate_size,
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        head_dim=getattr(text, "head_dim", None),
    )
    shape: Model = build(tower_shape(vision), language)
    return shape


def tower_shape(config: Any) -> Tower:
    """Shape from a vision tower's configuration, in the field names of SigLIP and CLIP, or of Qwen."""
    qwen = hasattr(config, "depth")
    return Tower(
        hidden=config.hidden_size,
        layers=config.depth if qwen else config.num_hidden_layers,
        heads=config.num_heads if qwen else config.num_attention_heads,
        mlp=config.intermediate_size,
        image_px=math.isqrt(getattr(config, "num_position_embeddings", 0)) * config.patch_size if qwen else config.image_size,
        patch_px=config.patch_size,
        gated=config.model_type == "qwen2_5_vl",
        window=4 * _native(config) if qwen else None,
    )


def _native(vision: Any) -> int:
    """Visual tokens of IMAGE at native resolution, one per 2 x 2 patches."""
    return math.prod(round(pixels / (vision.spatial_merge_size * vision.patch_size)) for pixels in IMAGE)
