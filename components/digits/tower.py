"""Vision tower of the embedded family: SigLIP architecture, pretrained to classify every cell of an image.

Labels are caption words: a caption of `cells * k` words, in reading order, has k words for each cell. The tower predicts
them at each visual token of the cell; then it is frozen and shared by teachers and students, as SigLIP is in the paper.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from components.config.models import TowerShape, TowerTraining
from components.digits.train_loop import Log, epochs, fit
from components.errors import DataError

ENCODE_BATCH = 250


def new_tower(shape: TowerShape, image_px: int) -> SiglipVisionModel:
    """Untrained tower. Raises DataError if the image is not a whole number of patches."""
    if image_px % shape.patch_px:
        raise DataError(f"images of {image_px} px are no whole number of patches of tower.patch_px = {shape.patch_px}")
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            image_size=image_px,
            patch_size=shape.patch_px,
            vision_use_head=False,
        )
    )


def normalised(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> float32 in -1..1, as SiglipImageProcessor normalises an image of the right size."""
    return images.float() / 127.5 - 1


def features(tower: nn.Module, pixels: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, Nv, D) hidden states of the last layer, as in LLaVA with vision_feature_layer -1."""
    states: Tensor = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    return states


@torch.no_grad()
def encode(tower: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, Nv, D) features on `device`, in batches; computed once, since the tower is frozen."""
    return torch.cat([features(tower, normalised(chunk.to(device))) for chunk in images.split(ENCODE_BATCH)])


def cell_words(captions: list[list[int]], visual_tokens: int, patches: int = 1) -> Tensor:
    """(N, Nv, k) token ids: each caption's words by cell, in reading order; a cell is a square of `patches` x `patches` visual
    tokens.

    Raises DataError if captions are not of one length, k words for each cell of a square grid.
    """
    side = math.isqrt(visual_tokens) // patches
    lengths = {len(caption) for caption in captions}
    if (side * patches) ** 2 != visual_tokens or len(lengths) != 1 or (length := lengths.pop()) == 0 or length % side**2:
        raise DataError(
            f"captions must all have the same number of words for each square of {patches} x {patches} of the {visual_tokens}"
            f" visual tokens; found captions of {', '.join(str(n) for n in sorted({len(c) for c in captions})[:5])} words."
            " The embedded family reads captions of `source: digits` with tower.cell_px = digits.cell_px"
        )
    cells = torch.tensor(captions).view(len(captions), side, side, -1)
    return cells.repeat_interleave(patches, 1).repeat_interleave(patches, 2).flatten(1, 2)


def train_tower(
    tower: SiglipVisionModel, images: Tensor, words: Tensor, training: TowerTraining, generator: torch.Generator, log: Log
) -> float:
    """Train in place to predict `words` (N, Nv, k) from `images` (N, 3, H, W) uint8; returns the balanced accuracy over the
    last 5% of steps: all words of a slot count equally (an empty cell does not weigh eight times a digit).
    """
    device = next(tower.parameters()).device
    slots = [words[..., slot].unique(return_inverse=True) for slot in range(words.shape[-1])]
    balance = [1 / labels.flatten().bincount().to(device) for _, labels in slots]
    heads = nn.ModuleList(nn.Linear(tower.config.hidden_size, len(classes)) for classes, _ in slots).to(device)
    batches = epochs(len(images), training.batch_size, generator)
    accuracies: list[float] = []

    def step_loss(step: int) -> Tensor:
        index = torch.tensor(next(batches))
        pixels = normalised(images[index])
        pixels += 2 * training.noise * torch.randn(pixels.shape, generator=generator)
        states = features(tower, pixels.to(device)).flatten(0, 1)
        losses = []
        for head, weight, (_, labels) in zip(heads, balance, slots, strict=True):
            target = labels[index].flatten().to(device)
            logits = head(states)
            losses.append(F.cross_entropy(logits, target, weight=weight, label_smoothing=training.label_smoothing))
            if step > training.steps * 0.95:
                correct = (logits.argmax(-1) == target).float()
                accuracies.append(float((correct * weight[target]).sum() / weight[target].sum()))
        return torch.stack(losses).mean()

    tower.train()
    fit([*tower.parameters(), *heads.parameters()], step_loss, training, "vision tower", log)
    tower.eval().requires_grad_(False)
    return sum(accuracies) / len(accuracies)
