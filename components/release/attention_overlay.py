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
from components.release.model import Named
from components.report.figures import draw

FOLDER = REPORTS / "try"


@dataclass(frozen=True)
class Seen:
    """Attention overlays of one model: a heat map per image, the choice of layer, and the images."""

    heats: list[Heat]
    how: str
    images: list[NDArray[np.uint8]]  # (H, W, 3)


@torch.inference_mode()
def attention_of(named: Named, loaded: Loaded, batch: Batch, sample: Sample, answer: str) -> Seen:
    """Attention maps of each image: from the instruction tokens after it to its visual tokens, mean over heads and tokens, of
    the layer from `layer_of` or the mean over all layers.

    Raises InputError if the visual tokens' positions in the image are unknown.
    """
    layers = loaded.layers
    layer, how = layer_of(named, layers)
    view = VLM(loaded.model)
    probe = AttentionProbe.from_masks(batch.instruction, batch.pictures)
    with probing(loaded.model, list(range(layers)) if layer is None else [layer], probe):
        view.plain(batch, view.features(batch), keep=False)
    attention = torch.stack([seen[0] for seen in probe.maps.values()]).mean(0).float().cpu().numpy()
    numbers = probe.pictures[0].cpu().numpy()
    grids = [_placed(loaded, batch, attention[numbers == number + 1], number) for number in range(len(sample.images))]
    title = f"{named.name}, {'all layers' if layer is None else f'layer {layer}'}"
    heats = [Heat(title, answer or "(nothing)", (grid / grid.mean()).astype(np.float32)) for grid in grids]
    return Seen(heats, how, _images(loaded, sample))


def _placed(loaded: Loaded, batch: Batch, attention: NDArray[Any], number: int) -> NDArray[Any]:
    if (grid := placed(loaded, batch, attention, number)) is None:
        raise InputError(
            f"--look: {len(attention)} visual tokens of {loaded.name} are no square, so there is no picture of them"
        )
    return grid


def layer_of(named: Named, layers: int) -> tuple[int | None, str]:
    """Layer to show, with the reason as a phrase; None: the mean over all `layers`."""
    choice = LayerChoice.found() if named.arm is not None and (IRS / "layer.json").is_file() else None
    if choice is None:
        return None, "the mean over all layers, for no layer search was made of this model"
    if named.arm == TEACHER_ARM:
        return choice.picked.layer, "the layer that the layer search chose"
    depth = choice.picked.layer / max(1, len(choice.irs) - 1)
    same = f"as deep in its {layers} layers as layer {choice.picked.layer} lies in the teacher's {len(choice.irs)}"
    return round(depth * (layers - 1)), f"{same}, which the layer search chose"


def _images(loaded: Loaded, sample: Sample) -> list[NDArray[np.uint8]]:
    """Images as seen by the model: preprocessed if the family crops, else only decoded."""
    crops = family_of(loaded.model.config).crops
    return [preprocessed_image(loaded.processor, image) if crops else np.asarray(image) for image in decode_images(sample)]


def draw_overlays(name: str, question: str, attended: list[Seen]) -> Path:
    """Draw the models' heat maps beside each image as preprocessed for the first model, with question and answers below.

    Returns the path of the PNG, `name` in `FOLDER`.
    """
    of_image = [[seen.heats[number] for seen in attended] for number in range(len(attended[0].images))]

    words = " ".join(question.replace(IMAGE, " ").split())
    path = FOLDER / f"{name}.png"
    write_bytes(path, draw(heatmaps, attended[0].images, of_image, words, "attention / equal share"))
    return path
