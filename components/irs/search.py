"""Layer search: ranks the teacher's layers by IRS, the change of their attention maps with the instruction (docs/method.md).

One pass over images with several instructions. Probes read all layers at once, instruction rows x visual columns only, while
the model keeps its fused attention.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from components.align_ti.batch import Batch, by_column
from components.config.irs import IrsSettings
from components.dataset.shards import CAPTION, Sample, Samples, Turn
from components.errors import DataError
from components.irs.score import irs_scores
from components.models.attention import AttentionProbe, attention_layers, probing
from components.models.collate import Collator
from components.models.load import Loaded
from components.models.rendered import question_of
from components.models.template import IMAGE, Template
from components.models.vlm import VLM
from components.records.irs import Rows

Z = 1.96  # two-sided 95% quantile of the standard normal distribution


class TooFewInstructions(DataError):
    """Fewer than two images have enough different instructions: `usable` of `images`."""

    def __init__(self, usable: int, images: int, settings: IrsSettings) -> None:
        fewer = " lower params/irs.yaml:instructions_per_image (at least 2)," if settings.instructions_per_image > 2 else ""
        super().__init__(
            f"IRS compares instructions on one image, over two images or more: {usable} of {images} images have"
            f" {settings.instructions_per_image} different instructions besides captions;{fewer} give images more questions, or"
            " do without a layer: iva.weighting: uniform in params/distill.yaml"
        )


@dataclass(frozen=True)
class AttentionMaps:
    """Attention maps of every layer, per image and instruction."""

    samples: list[list[Sample]]  # X images with I single-image samples each, one per instruction
    attention: dict[Rows, Tensor]  # (L, X, I, Nv) float32 per kind of rows, zero-padded
    tokens: Tensor  # (X,) visual tokens of each image


@dataclass(frozen=True)
class Ranking:
    """IRS of all layers, the best and the runner-up."""

    layer: int  # layer of highest IRS
    irs: list[float]  # per layer
    standard_error: list[float]  # per layer, over images
    runner_up: int
    separated: bool  # see LayerChoice


def measure(loaded: Loaded, samples: Samples, template: Template, settings: IrsSettings) -> Ranking:
    """IRS ranking of a model's layers. Raises as `attention_maps` does."""
    return rank(attention_maps(loaded, samples, template, settings, ("all",)).attention["all"])


def attention_maps(
    loaded: Loaded, samples: Samples, template: Template, settings: IrsSettings, kinds: Sequence[Rows] = ("all", "words")
) -> AttentionMaps:
    """Attention maps from instructions to image in all layers, one forward pass per `settings.batch_size` prompts.

    Raises:
        TooFewInstructions: fewer than two images have `settings.instructions_per_image` different instructions.
    """
    drawn_images = draw_images(samples, settings)
    prompts = [prompt for image in drawn_images for prompt in image]
    # No length limit: the answer is not read. Padding goes right, as in training.
    collators = {rows: Collator(loaded.processor, template, max_length=sys.maxsize, train=True, rows=rows) for rows in kinds}
    vlm = VLM(loaded.model)
    parts: dict[Rows, list[Tensor]] = {rows: [] for rows in kinds}
    image_numbers: list[Tensor] = []
    for start in tqdm(range(0, len(prompts), settings.batch_size), desc="attention", unit="batch"):
        batch_prompts = prompts[start : start + settings.batch_size]
        batch = collators["all"](batch_prompts).to(loaded.model.device)
        instruction_masks = {rows: collators[rows].text(batch_prompts).instruction.to(loaded.model.device) for rows in kinds}
        for rows, maps in _attention(vlm, batch, instruction_masks).items():
            parts[rows].append(maps)
        image_numbers.append(by_column(batch.pictures).cpu())
    shape = (len(drawn_images), settings.instructions_per_image)
    attention = {rows: _padded(batches).unflatten(1, shape) for rows, batches in parts.items()}
    return _split_images(drawn_images, attention, _padded([row[None] for row in image_numbers])[0].unflatten(0, shape)[:, 0])


def _split_images(drawn_images: list[list[Sample]], attention: dict[Rows, Tensor], image_numbers: Tensor) -> AttentionMaps:
    """Split (L, X, I, Nv) attention over samples of several images into single images; `image_numbers` (X, Nv): `by_column`."""
    numbers = range(1, int(image_numbers.max()) + 1)
    tokens = torch.stack([(image_numbers == number).sum(1) for number in numbers], dim=1)  # (X, max images)
    if tokens.shape[1] == 1:
        return AttentionMaps(drawn_images, attention, tokens[:, 0])
    image_indices = tokens.nonzero().tolist()
    samples = [
        [replace(sample, image=sample.images[image], more=()) for sample in drawn_images[x]] for x, image in image_indices
    ]
    per_image = {
        rows: _padded([maps[:, x, :, image_numbers[x] == image + 1][:, None] for x, image in image_indices])
        for rows, maps in attention.items()
    }
    return AttentionMaps(samples, per_image, tokens[tokens > 0])


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """(L, n, Nv) concatenation of batches, zero-padded, which leaves cosines unchanged."""
    width = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in parts], dim=1)


def draw_images(samples: Samples, settings: IrsSettings) -> list[list[Sample]]:
    """`settings.images` images, sampled by seed from those with enough different instructions; all of them if there are fewer.

    Rows of tar and Parquet files have an image each: if fewer than two qualify, rows with equal images are merged. Captions do
    not count, since all images share one instruction. Raises TooFewInstructions if fewer than two images qualify, as one has
    no standard error.
    """
    images = _draw(samples, [[row] for row in range(samples.images)], settings)
    if len(images) < 2:
        images = _draw(samples, samples.equal_images(), settings)
    if len(images) < 2:
        raise TooFewInstructions(len(images), samples.images, settings)
    return images


def _draw(samples: Samples, images: list[list[int]], settings: IrsSettings) -> list[list[Sample]]:
    """Seeded draw of `draw_images` over `images`, the rows of each image."""
    random = np.random.default_rng(settings.seed)
    drawn: list[list[Sample]] = []
    for image in random.permutation(len(images)):
        distinct = instructions([samples[index] for row in images[image] for index in samples.of_image(row)])
        if len(distinct) >= settings.instructions_per_image:
            selected = random.choice(len(distinct), settings.instructions_per_image, replace=False)
            drawn.append([distinct[index] for index in sorted(selected)])
        if len(drawn) == settings.images:
            break
    return drawn


def rank(attention: Tensor) -> Ranking:
    """IRS per layer with its standard error over images, the best layer, and its separation from the runner-up.

    A one-layer model is its own runner-up, and not separated.

    Args:
        attention: (L, X, I, Nv), X >= 2 and I >= 2.
    """
    per_image = irs_scores(attention.double())
    scores = per_image.mean(1)
    ranked = scores.argsort(descending=True, stable=True).tolist()
    best, runner_up = ranked[0], ranked[min(1, len(ranked) - 1)]
    errors = [standard_error(layer) for layer in per_image]
    return Ranking(best, scores.tolist(), errors, runner_up, separated(per_image[best] - per_image[runner_up]))


def separated(lead: Tensor) -> bool:
    """True if the mean of paired differences (X,) is above `Z` standard errors."""
    return float(lead.mean()) > Z * standard_error(lead)


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values (X,), X >= 2."""
    return float(values.std(correction=1)) / math.sqrt(len(values))


def furthest_apart(attention: Tensor) -> tuple[int, int]:
    """Indices of the two instructions of lowest cosine in (I, Nv) attention."""
    unit = attention / attention.norm(dim=-1, keepdim=True)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1)
    lowest = int((unit[first] * unit[second]).sum(-1).argmin())
    return int(first[lowest]), int(second[lowest])


def instructions(samples: Sequence[Sample]) -> list[Sample]:
    """One single-turn sample per distinct question, from any turn that comes after all images of its sample."""
    distinct: dict[str, Sample] = {}
    for sample in samples:
        for index, turn in enumerate(sample.turns if sample.images and sample.kind != CAPTION else ()):
            if len(sample.upto(index + 1).images) == len(sample.images):
                images_before = len(sample.images) - turn.question.count(IMAGE)
                question = Turn(f"{IMAGE}\n" * images_before + turn.question, turn.answer, turn.boxes)
                distinct.setdefault(question_of(turn), replace(sample, turns=(question,)))
    return list(distinct.values())


@torch.inference_mode()
def _attention(vlm: VLM, batch: Batch, instruction_masks: dict[Rows, Tensor]) -> dict[Rows, Tensor]:
    """Attention maps (L, B, Nv) float32 on the CPU, per mask (B, T) of instruction rows; zero-padded to the batch's largest
    Nv."""
    layers = list(attention_layers(vlm.model))
    probes = {rows: AttentionProbe.from_masks(mask, batch.pictures) for rows, mask in instruction_masks.items()}
    with ExitStack() as stack:
        for probe in probes.values():
            stack.enter_context(probing(vlm.model, layers, probe))
        vlm.plain(batch, vlm.features(batch), keep=False)
    return {rows: torch.stack([probe.maps[layer] for layer in layers]).cpu() for rows, probe in probes.items()}
