"""Table of model families: one row holds what transformers' common interface does not cover.

The interface covers vision encoder and language model (`get_encoder`, `get_decoder`), features of pixels
(`get_image_features`) and features in place of pixels (`mm_encoder_outputs`). docs/add_a_family.md
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
        tower: name, under `model.model`, of the module with the vision encoder.
        projector: names, under `model.model`, of the modules between vision encoder and language model.
        token_types: the argument, if there is one, that tells the model which tokens are an image's, or which are the prompt's.
        whole: where the tokens of the whole image stand, in families that cut it into tiles as well: before or after these.
        crops: visual tokens cover a crop of the image.
        gguf: llama.cpp's converter names its text and vision parts (by its source; it was not run here).
    """

    title: str
    tower: str = "vision_tower"
    projector: tuple[str, ...] = ("multi_modal_projector",)
    token_types: tuple[str, Literal["image", "prompt"]] | None = None
    whole: Literal["first", "last"] | None = None
    crops: bool = False
    gguf: bool = False

    @property
    def unquantised(self) -> list[str]:
        """Modules of a quantised teacher that stay in float: head, vision encoder, projector."""
        return ["lm_head", *dict.fromkeys(path.split(".")[0] for path in (self.tower, *self.projector))]


def _qwen(title: str, *projector: str) -> Family:
    return Family(title, "visual", ("visual.merger", *projector), ("mm_token_type_ids", "image"), gguf=True)


FAMILIES = {  # by `model_type` of config.json
    "llava": Family("LLaVA-1.5", crops=True),
    "llava_next": Family("LLaVA-NeXT", projector=("multi_modal_projector", "image_newline"), whole="first"),
    "llava_onevision": Family("LLaVA-OneVision", projector=("multi_modal_projector", "image_newline"), whole="first"),
    "qwen2_vl": _qwen("Qwen2-VL"),
    "qwen2_5_vl": _qwen("Qwen2.5-VL"),
    "qwen3_vl": _qwen("Qwen3-VL", "visual.deepstack_merger_list"),
    "internvl": Family("InternVL 3, 3.5", whole="last"),
    "idefics3": Family("Idefics3", "vision_model", ("connector",), whole="last"),
    "smolvlm": Family("SmolVLM, SmolVLM2", "vision_model", ("connector",), whole="last", gguf=True),
    "gemma3": Family("Gemma 3", token_types=("token_type_ids", "image"), gguf=True),
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
