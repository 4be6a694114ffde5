"""Conversion of TinyLLaVA checkpoints to stock LLaVA folders: weights renamed, no remote code.

TinyLLaVA Factory (arXiv 2405.11788) joins SigLIP, a two-layer projector and Qwen2.5 as the paper does; teachers and students of
LLaVA-CKD (arXiv 2605.10641) are published in its format. Its strategy `patch` drops the first token of every image, though
SigLIP has no class token: these models were trained on 728 of 729 tokens, and are loaded that way here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from components.errors import ModelError, first_line
from components.io import whole_folder
from components.models.assemble import (
    LANGUAGE_MODELS,
    TOWERS,
    Strategy,
    build_llava,
    build_processor,
    headless_tower_class,
    load_tokenizer,
)
from components.models.checkpoint_folder import check_loading_info, weight_files
from components.records.record import parsed

TYPE = "tinyllava"
STRATEGIES: dict[str, Strategy] = {"patch": "default", "cls_patch": "full"}
PREFIXES = {"tower": "vision_tower._vision_tower.", "language": "language_model.", "projector": "connector._connector."}
LAYERS = {"0.": "linear_1.", "2.": "linear_2."}  # projector layers; 1 is the GELU


def is_tinyllava(path: Path) -> bool:
    """Whether a folder from `locate`, which checks its files, is a TinyLLaVA checkpoint."""
    return parsed(path / "config.json").get("model_type") == TYPE


def convert(source: Path, system: str, target: Path) -> Path:
    """Write the stock LLaVA folder `target`, atomically. `system`: text before the first turn, for the chat template.

    Raises ModelError if a part is missing or of an unsupported type.
    """
    from transformers import SiglipImageProcessorPil

    config, weights = parsed(source / "config.json"), _weights(source)
    if config.get("connector_type") != "mlp2x_gelu" or config.get("image_aspect_ratio", "square") != "square":
        raise ModelError(
            f"{source}: of TinyLLaVA's models those with connector_type mlp2x_gelu and image_aspect_ratio square are read, not"
            f" {config.get('connector_type')} and {config.get('image_aspect_ratio')}"
        )
    if (strategy := STRATEGIES.get(config.get("vision_feature_select_strategy", "patch"))) is None:
        raise ModelError(f"{source}: vision_feature_select_strategy is none of {', '.join(STRATEGIES)}")
    tower = _load_part(config.get("vision_config"), TOWERS, weights["tower"], source)
    language = _load_part(config.get("text_config"), LANGUAGE_MODELS, weights["language"], source)
    side, layer = tower.config.image_size, int(config.get("vision_feature_layer", -2))
    image_processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    processor = build_processor(
        image_processor, tower, load_tokenizer(source, language.config), layer, system, source, strategy
    )
    llava = build_llava(tower, language, processor, layer, strategy)
    projector_weights = {LAYERS.get(name[:2], "?") + name[2:]: weight for name, weight in weights["projector"].items()}
    try:
        llava.model.multi_modal_projector.load_state_dict(projector_weights, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{source}: its projector does not fit: {first_line(error)}") from None
    with whole_folder(target) as draft:
        llava.save_pretrained(draft)
        processor.save_pretrained(draft)
    return target


def _weights(path: Path) -> dict[str, dict[str, Tensor]]:
    """State dict of each part, prefixes removed. Raises ModelError for a weight of no part."""
    weights: dict[str, dict[str, Tensor]] = {part: {} for part in PREFIXES}
    for file in weight_files(path):
        for name, weight in load_file(file).items():
            part = next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), None)
            if part is None:
                raise ModelError(f"{file}: {name} is a weight of none of {', '.join(PREFIXES.values())}")
            weights[part][name.removeprefix(PREFIXES[part])] = weight
    return weights


def _load_part(config: dict[str, Any] | None, model_types: tuple[str, ...], weights: dict[str, Tensor], path: Path) -> Any:
    """Model of one part in its weights' dtype.

    Raises ModelError if its type is none of `model_types` or weights are missing.
    """
    from transformers import AutoConfig, Qwen2ForCausalLM, Qwen3ForCausalLM

    model_type = (config or {}).get("model_type")
    if config is None or model_type not in model_types:
        raise ModelError(f"{path}: a part is of type {model_type!r}, and is to be {' or '.join(model_types)}")
    model_classes: dict[str, Any] = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}
    model_class = model_classes[model_type] if model_type in model_classes else headless_tower_class()
    model_config = AutoConfig.for_model(**(config if model_type in model_classes else config | {"vision_use_head": False}))
    dtype = next((weight.dtype for weight in weights.values()), None)
    model, loading_info = model_class.from_pretrained(
        None, config=model_config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    check_loading_info(loading_info, path)
    return model
