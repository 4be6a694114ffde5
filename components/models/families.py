"""Table of model families: facts that transformers' common interface does not cover.

The interface covers vision encoder and language model (`get_encoder`, `get_decoder`), image features
(`get_image_features`) and precomputed features in place of pixels (`mm_encoder_outputs`). docs/add_a_family.md
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
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
        token_types: name of the token type argument, if any, and whether it marks image tokens or separates prompt from answer.
        whole: position of the whole image's tokens relative to its tiles', in families that split images.
        crops: visual tokens cover a crop of the image.
        gguf: llama.cpp's converter has its text and vision parts (by its source; not run).
    """

    title: str
    tower: str = "vision_tower"
    projector: tuple[str, ...] = ("multi_modal_projector",)
    token_types: tuple[str, Literal["image", "prompt"]] | None = None
    whole: Literal["first", "last"] | None = None
    crops: bool = False
    gguf: bool = False

    @property
    def images_see_question(self) -> bool:
        """Whether an image's hidden states depend on the question after it."""
        return self.token_types is not None and self.token_types[1] == "prompt"

    @property
    def unquantised(self) -> list[str]:
        """Modules of a quantised teacher kept in float: head, vision encoder, projector."""
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
    """Family of a configuration. Raises ModelError if its `model_type` is not in FAMILIES."""
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise ModelError(
            f"{config.name_or_path}: models of type {model_type!r} are not supported: no test says which of their tokens are"
            f" visual, nor what their masks and position ids are; there are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def parts(model: Any) -> dict[str, list[nn.Parameter]]:
    """Parameters by part, named as in `trainable` of params/distill.yaml. Each is in exactly one part."""
    encoder = {id(p): "vision_tower" for p in model.get_encoder(modality="image").parameters()}
    modules = [attrgetter(name)(model.model) for name in family_of(model.config).projector]
    projector = {id(p): "projector" for module in modules for p in _parameters(module)}
    part_of = encoder | projector
    parameters_by_part: dict[str, list[nn.Parameter]] = {"vision_tower": [], "projector": [], "language_model": []}
    for parameter in model.parameters():
        parameters_by_part[part_of.get(id(parameter), "language_model")].append(parameter)
    return parameters_by_part


def reads_one_layer(model: Any) -> bool:
    """Whether features are those of LLaVA-1.5: one layer of the tower, then the projector."""
    return model.config.model_type == "llava" and isinstance(model.config.vision_feature_layer, int)


def _parameters(module: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [module] if isinstance(module, nn.Parameter) else list(module.parameters())


def prompt(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Inputs of the stock forward and `generate`. No `pixel_values` without an image: `generate` would encode None."""
    pixels = {} if batch.pixel_values is None else {"pixel_values": batch.pixel_values}
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **pixels, **inputs(model, batch)}


def inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Inputs of forward and `generate` other than tokens, attention mask and pixels: image sizes, token types."""
    token_types = family_of(model.config).token_types
    if token_types is None:
        return dict(batch.image_inputs)
    name, marked = token_types
    # Prompt: all before the first answer, without padding. PaliGemma's attention is bidirectional within it.
    types = batch.visual if marked == "image" else (batch.response.cumsum(1) > 0) | (batch.attention_mask == 0)
    return {**batch.image_inputs, name: types.to(torch.long)}
