"""Attention overlay of `alignti try --look`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from components.dataset.shards import Sample
from components.errors import InputError
from components.io import write_bytes
from components.irs.overlays import Heat, heatmaps
from components.irs.regions import seen_by
from components.models.attention import Look, watching
from components.models.collate import Batch, decode
from components.models.families import family_of
from components.models.load import Loaded
from components.models.vlm import VLM
from components.records.irs import LayerChoice
from components.records.paths import IRS, REPORTS, TEACHER_ARM
from components.release.model import Named
from components.report.figures import draw

FOLDER = REPORTS / "try"


@dataclass(frozen=True)
class Seen:
    """One model's panel, and the image under it."""

    heat: Heat
    how: str
    image: NDArray[np.uint8]  # (H, W, 3)


@torch.inference_mode()
def look(named: Named, loaded: Loaded, batch: Batch, sample: Sample, answer: str) -> Seen:
    """The attention from the question's tokens to the image's, mean over heads, of one layer, or of all where none is known.

    Raises InputError if it is not known where the visual tokens lie in the image.
    """
    layers: int = loaded.model.config.get_text_config().num_hidden_layers
    layer, how = layer_of(named, layers)
    view = VLM(loaded.model)
    with watching(
        loaded.model, list(range(layers)) if layer is None else [layer], Look.at(batch.instruction, batch.pictures)
    ) as eyes:
        view.plain(batch, view.features(batch), keep=False)
    attention = torch.stack([seen[0] for seen in eyes.seen.values()]).mean(0).float().cpu().numpy()
    grid = placed(loaded, batch, attention)
    title = f"{named.name}, {'all layers' if layer is None else f'layer {layer}'}"
    return Seen(Heat(title, answer or "(nothing)", (grid / grid.mean()).astype(np.float32)), how, _image(loaded, sample))


def layer_of(named: Named, layers: int) -> tuple[int | None, str]:
    """Which of the model's `layers` to show, and why that one. None: all of them."""
    choice = LayerChoice.found() if named.arm is not None and (IRS / "layer.json").is_file() else None
    if choice is None:
        return None, "the mean over all layers, for no layer search was made of this model"
    if named.arm == TEACHER_ARM:
        return choice.picked.layer, "the layer that the layer search chose"
    depth = choice.picked.layer / max(1, len(choice.irs) - 1)
    same = f"as deep in its {layers} layers as layer {choice.picked.layer} lies in the teacher's {len(choice.irs)}"
    return round(depth * (layers - 1)), f"{same}, which the layer search chose"


def placed(loaded: Loaded, batch: Batch, attention: NDArray[Any]) -> NDArray[Any]:
    """(Nv,) -> (rows, columns) over the whole image. Raises InputError if it is not known where the tokens lie."""
    if (grid := batch.image_inputs.get("image_grid_thw")) is not None:
        merged = loaded.processor.image_processor.merge_size
        return attention.reshape(int(grid[0, 1]) // merged, int(grid[0, 2]) // merged)
    whole, count = family_of(loaded.model.config).whole, len(attention)
    if whole is not None:
        processor = loaded.processor
        names = ("num_image_tokens", "image_seq_length", "image_seq_len")
        count = next((getattr(processor, name) for name in names if getattr(processor, name, None)), None) or _patches(loaded)
        attention = attention[:count] if whole == "first" else attention[-count:]
    side = math.isqrt(count)
    if side * side != len(attention):
        raise InputError(
            f"--look: {len(attention)} visual tokens of {loaded.name} are no square, so there is no picture of them"
        )
    return attention.reshape(side, side)


def _patches(loaded: Loaded) -> int:
    vision = loaded.model.config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2


def _image(loaded: Loaded, sample: Sample) -> NDArray[np.uint8]:
    """The part of the image that visual tokens cover."""
    image = decode(sample)
    return seen_by(loaded.processor, image) if family_of(loaded.model.config).crops else np.asarray(image)


def draw_looks(name: str, looks: list[Seen]) -> Path:
    """The models' panels beside the image as the first of them sees it. Returns the PNG's path, which `name` decides."""
    path = FOLDER / f"{name}.png"
    write_bytes(path, draw(heatmaps, looks[0].image, [seen.heat for seen in looks], "attention / equal share"))
    return path
