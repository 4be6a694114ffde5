"""What differs between families of vision-language models beyond what transformers' own interface hides.

All of them say where their vision encoder and their language model are (`get_encoder`, `get_decoder`), turn pixels into
features (`get_image_features`) and take those in place of pixels (`mm_encoder_outputs`). The rest stands in the table below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from components.errors import ModelError

if TYPE_CHECKING:
    from components.align_ti.batch import Batch


@dataclass(frozen=True)
class Family:
    """One row of docs/families.md.

    Args:
        projector: names, under `model.model`, of the modules between vision encoder and language model.
        token_types: the argument, if there is one, that tells the model which tokens are an image's, or which are the prompt's.
    """

    title: str
    projector: tuple[str, ...] = ("multi_modal_projector",)
    token_types: tuple[str, Literal["image", "prompt"]] | None = None


_MROPE: tuple[str, Literal["image", "prompt"]] = ("mm_token_type_ids", "image")
FAMILIES = {  # by `model_type` of config.json
    "llava": Family("LLaVA-1.5"),
    "llava_next": Family("LLaVA-NeXT", ("multi_modal_projector", "image_newline")),
    "llava_onevision": Family("LLaVA-OneVision", ("multi_modal_projector", "image_newline")),
    "qwen2_vl": Family("Qwen2-VL", ("visual.merger",), _MROPE),
    "qwen2_5_vl": Family("Qwen2.5-VL", ("visual.merger",), _MROPE),
    "qwen3_vl": Family("Qwen3-VL", ("visual.merger", "visual.deepstack_merger_list"), _MROPE),
    "internvl": Family("InternVL 3, 3.5"),
    "idefics3": Family("Idefics3", ("connector",)),
    "smolvlm": Family("SmolVLM, SmolVLM2", ("connector",)),
    "gemma3": Family("Gemma 3", token_types=("token_type_ids", "image")),
    "paligemma": Family("PaliGemma, PaliGemma 2", token_types=("token_type_ids", "prompt")),
}


def family_of(config: Any) -> Family:
    """Raises ModelError if the configuration's is none of the families that are known to work."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ModelError(
            f"{config.name_or_path}: models of type {kind!r} are not supported: no test says which of their tokens are visual,"
            f" nor what their masks and position ids are; there are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[kind]


def parts(model: Any) -> dict[str, list[nn.Parameter]]:
    """The model's parameters as `trainable` of params/distill.yaml names them. Every one is in exactly one part."""
    names = [name.split(".") for name in family_of(model.config).projector]
    encoder = {id(p): "vision_tower" for p in model.get_encoder(modality="image").parameters()}
    projector = {id(p): "projector" for path in names for p in _parameters(model.model, path)}
    of = encoder | projector
    found: dict[str, list[nn.Parameter]] = {"vision_tower": [], "projector": [], "language_model": []}
    for parameter in model.parameters():
        found[of.get(id(parameter), "language_model")].append(parameter)
    return found


def reads_one_layer(model: Any) -> bool:
    """Is it LLaVA-1.5's way from pixels to features: one layer of the tower, then the projector?"""
    return model.config.model_type == "llava" and isinstance(model.config.vision_feature_layer, int)


def _parameters(module: Any, path: list[str]) -> list[nn.Parameter]:
    for name in path:
        module = getattr(module, name)
    return [module] if isinstance(module, nn.Parameter) else list(module.parameters())


def prompt(model: Any, batch: Batch) -> dict[str, Tensor]:
    """All that the stock forward and `generate` take. Without an image there are no pixels: `generate` would encode None."""
    pixels = {} if batch.pixel_values is None else {"pixel_values": batch.pixel_values}
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **pixels, **inputs(model, batch)}


def inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What the model's forward and `generate` take beside tokens, attention mask and pixels: sizes of images, token types."""
    wanted = family_of(model.config).token_types
    if wanted is None:
        return dict(batch.image_inputs)
    name, of = wanted
    # What follows the first answer, padding too, is no prompt: PaliGemma lets prompt tokens see each other.
    types = batch.visual if of == "image" else (batch.response.cumsum(1) > 0) | (batch.attention_mask == 0)
    return {**batch.image_inputs, name: types.to(torch.long)}
