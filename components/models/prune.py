"""Pruned students: fewer decoder layers and narrower MLPs of a teacher, everything else copied.

Layers 0, every, 2 every, ... are kept. Each MLP keeps the neurons of the largest group magnitude: the l2 norm over a neuron's
rows of gate and up and its column of down (DepGraph, arXiv 2301.12900; the l2 criterion of LLM-Pruner, arXiv 2305.11627).
An MLP is a sum over neurons, so the pruned one equals the teacher's with the other neurons at zero.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from components.config.models import Cut
from components.errors import ModelError
from components.models.checkpoint_folder import INDEX, LOCAL, as_model_error, config_of, weight_files

EXACT = (  # language models of uniform layers (but for `layer_types`) with gate, up and down projections
    "gemma2",
    "gemma3_text",
    "llama",
    "qwen2",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_vl_text",
)


def cut(teacher: Path, settings: Cut, target: Path) -> Path:
    """Write the pruned checkpoint of `teacher` to `target`.

    Raises ModelError if the architecture is not in `EXACT`, its layers cannot be dropped, or its MLPs are narrower than `mlp`.
    """
    from transformers import AutoModelForImageTextToText

    weight_files(teacher)
    with as_model_error(f"{teacher}: cannot be cut"):
        config = config_of(teacher)
        kept_layers = _kept_layers(config, settings, teacher)
        with tqdm(
            total=2, desc=f"{target.parent.name} {target.name}: layers {', '.join(map(str, kept_layers))}", unit="pass"
        ) as bar:
            model: Any = AutoModelForImageTextToText.from_pretrained(teacher, dtype="auto", use_safetensors=True, **LOCAL)
            bar.update()
            layers = next(name for name, module in model.named_modules() if module is model.get_decoder().layers)
            weights = prune_mlps(select_layers(model.state_dict(), layers, kept_layers), layers, settings.mlp)
            _shrink(config, kept_layers, settings.mlp)
            with torch.device("meta"):
                student: Any = type(model)(config)
            student.load_state_dict(weights, assign=True)
            if model.get_output_embeddings().weight is model.get_input_embeddings().weight:  # whatever the config says of it
                student.tie_weights()
            student.generation_config = model.generation_config
            student.save_pretrained(target)
            bar.update()
    for file in teacher.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    return target


def kept_layer_indices(path: Path, settings: Cut) -> list[int]:
    """Teacher layer indices of the pruned student at `path`."""
    return [index * settings.every for index in range(config_of(path).get_text_config().num_hidden_layers)]


def _kept_layers(config: Any, settings: Cut, teacher: Path) -> list[int]:
    """Indices of the kept layers. Raises ModelError if pruning would not be exact."""
    text = config.get_text_config()
    if text.model_type not in EXACT:
        raise ModelError(
            f"{teacher}: its language model is of type {text.model_type!r}, which is not cut: no test says that its layers"
            f" are alike and its MLPs made of gate, up and down, as those of {', '.join(EXACT)} are"
        )
    deepstack = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None)
    if deepstack and settings.every > 1:
        raise ModelError(
            f"{teacher}: image features enter its first {len(deepstack)} layers, each its own, so that none of them can be left"
            " out; set every: 1, and narrow the MLPs"
        )
    if settings.mlp is not None and settings.mlp > text.intermediate_size:
        raise ModelError(f"{teacher}: its MLPs have {text.intermediate_size} neurons, fewer than mlp: {settings.mlp}")
    return list(range(0, text.num_hidden_layers, settings.every))


def _shrink(config: Any, kept_layers: list[int], mlp: int | None) -> None:
    """Set the student's depth and MLP width in `config`, in place."""
    text = config.get_text_config()
    layer_types = getattr(text, "layer_types", None)
    if layer_types is not None:  # sliding-window layers
        text.layer_types = [layer_types[layer] for layer in kept_layers]
    text.num_hidden_layers = len(kept_layers)
    text.intermediate_size = mlp or text.intermediate_size


def select_layers(weights: dict[str, Tensor], layers: str, kept_layers: list[int]) -> dict[str, Tensor]:
    """State dict of the `kept_layers`, renumbered, and of everything outside `layers`."""
    new_indices = {str(layer): str(index) for index, layer in enumerate(kept_layers)}
    selected = {}
    for name, weight in weights.items():
        number, _, suffix = name.removeprefix(f"{layers}.").partition(".")
        if not name.startswith(f"{layers}."):
            selected[name] = weight
        elif number in new_indices:
            selected[f"{layers}.{new_indices[number]}.{suffix}"] = weight
    return selected


def prune_mlps(weights: dict[str, Tensor], layers: str, mlp: int | None) -> dict[str, Tensor]:
    """State dict with `mlp` neurons in each MLP of `layers`, in their original order."""
    if mlp is None:
        return weights
    pruned = dict(weights)
    suffix = ".gate_proj.weight"
    for name in [name for name in weights if name.startswith(f"{layers}.") and name.endswith(suffix)]:
        gate, up, down = (name.removesuffix(suffix) + f".{part}_proj" for part in ("gate", "up", "down"))
        neurons = largest_neurons(weights[f"{gate}.weight"], weights[f"{up}.weight"], weights[f"{down}.weight"], mlp)
        for key in (f"{part}.{kind}" for part in (gate, up) for kind in ("weight", "bias")):
            if key in weights:
                pruned[key] = weights[key][neurons]
        pruned[f"{down}.weight"] = weights[f"{down}.weight"][:, neurons].contiguous()
    return pruned


def largest_neurons(gate: Tensor, up: Tensor, down: Tensor, count: int) -> Tensor:
    """(count,) sorted indices of the neurons of gate (m, d), up (m, d) and down (d, m) with the largest joint l2 norm;
    ties go to the lower index."""
    squares = gate.double().square().sum(1) + up.double().square().sum(1) + down.double().square().sum(0)
    return squares.sort(descending=True, stable=True).indices[:count].sort().values
