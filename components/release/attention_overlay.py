"""Attention overlay of `alignti try --look`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from components.align_ti.batch import Batch
from components.dataset.shards import Sample
from components.errors import InputError
from components.io import write_bytes
from components.irs.overlays import Heat, heatmaps
from components.irs.regions import placed, preprocessed_image
from components.models.attention import AttentionProbe, probing
from components.models.families import family_of
from components.models.image_processor import decode_images
from components.models.load import Loaded
from components.models.template import IMAGE
from components.models.vlm import VLM
from components.records.irs import LayerChoice
from components.records.paths import IRS, REPORTS, TEACHER_ARM
from components.release.model import CheckpointRef
from components.report.figures import draw

OVERLAYS = REPORTS / "try"


@dataclass(frozen=True)
class AttentionOverlay:
    """Attention overlays of one model: a heat map per image, why that layer, and the images."""

    heats: list[Heat]
    layer_reason: str
    images: list[NDArray[np.uint8]]  # (H, W, 3)


@torch.inference_mode()
def compute_overlay(checkpoint: CheckpointRef, loaded: Loaded, batch: Batch, sample: Sample, answer: str) -> AttentionOverlay:
    """Attention maps of each image: from the instruction tokens after it to its visual tokens, mean over heads and tokens, of
    the layer from `select_layer` or the mean over all layers.

    Raises InputError if the visual tokens' positions in the image are unknown.
    """
    layers = loaded.layers
    layer, layer_reason = select_layer(checkpoint, layers)
    vlm = VLM(loaded.model)
    probe = AttentionProbe.from_masks(batch.instruction, batch.pictures)
    with probing(loaded.model, list(range(layers)) if layer is None else [layer], probe):
        vlm.plain(batch, vlm.features(batch), keep=False)
    attention = torch.stack([maps[0] for maps in probe.maps.values()]).mean(0).float().cpu().numpy()
    numbers = probe.pictures[0].cpu().numpy()
    grids = [_token_grid(loaded, batch, attention[numbers == number + 1], number) for number in range(len(sample.images))]
    title = f"{checkpoint.name}, {'all layers' if layer is None else f'layer {layer}'}"
    heats = [Heat(title, answer or "(nothing)", (grid / grid.mean()).astype(np.float32)) for grid in grids]
    return AttentionOverlay(heats, layer_reason, _images(loaded, sample))


def _token_grid(loaded: Loaded, batch: Batch, attention: NDArray[Any], number: int) -> NDArray[Any]:
    if (grid := placed(loaded, batch, attention, number)) is None:
        raise InputError(
            f"--look: {len(attention)} visual tokens of {loaded.name} are no square, so there is no picture of them"
        )
    return grid


def select_layer(checkpoint: CheckpointRef, layers: int) -> tuple[int | None, str]:
    """Layer to show, with the reason as a phrase; None: the mean over all `layers`."""
    choice = LayerChoice.read_if_searched() if checkpoint.arm is not None and (IRS / "layer.json").is_file() else None
    if choice is None:
        return None, "the mean over all layers, for no layer search was made of this model"
    if checkpoint.arm == TEACHER_ARM:
        return choice.picked.layer, "the layer that the layer search chose"
    depth = choice.picked.layer / max(1, len(choice.irs) - 1)
    reason = f"as deep in its {layers} layers as layer {choice.picked.layer} lies in the teacher's {len(choice.irs)}"
    return round(depth * (layers - 1)), f"{reason}, which the layer search chose"


def _images(loaded: Loaded, sample: Sample) -> list[NDArray[np.uint8]]:
    """Input images of the model: preprocessed if the family crops, else only decoded."""
    crops = family_of(loaded.model.config).crops
    return [preprocessed_image(loaded.processor, image) if crops else np.asarray(image) for image in decode_images(sample)]


def draw_overlays(name: str, question: str, overlays: list[AttentionOverlay]) -> Path:
    """Draw the models' heat maps beside each image as preprocessed for the first model, with question and answers below.

    Returns the path of the PNG, `name` in `OVERLAYS`.
    """
    heats_by_image = [[overlay.heats[number] for overlay in overlays] for number in range(len(overlays[0].images))]

    caption = " ".join(question.replace(IMAGE, " ").split())
    path = OVERLAYS / f"{name}.png"
    write_bytes(path, draw(heatmaps, overlays[0].images, heats_by_image, caption, "attention / equal share"))
    return path
