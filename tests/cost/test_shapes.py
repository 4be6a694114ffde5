"""Shapes of the models that recipes name: what they add up to is what is published; a downloaded config.json says the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers as tf

from components.config import recipes
from components.config.models import Checkpoint, Parts
from components.cost import shapes
from tests.families import toy

ROOT = Path(__file__).parents[2]

# Parameters, or half the bytes of the bf16 weights, as published: model cards, sizes of the repositories' weight files.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1.54e9,
    "Qwen/Qwen2.5-7B": 7.61e9,
    "Qwen/Qwen3-0.6B": 0.6e9,
    "Qwen/Qwen3-1.7B": 1.72e9,
    "Qwen/Qwen3-8B": 8.2e9,
    "Qwen/Qwen2.5-VL-3B-Instruct": 7_520_919_614 / 2,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29e9,
    "Qwen/Qwen3-VL-2B-Instruct": 4.27e9 / 2,
    "Qwen/Qwen3-VL-8B-Instruct": 8.77e9,
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 4_493_651_795 / 2,
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": 507.5e6,
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": 0.894e9,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": 8.03e9,
}


@pytest.mark.parametrize("source", PUBLISHED)
def test_weights_add_up_to_what_is_published(source: str) -> None:
    shape = (shapes.MODELS | shapes.LANGUAGE_MODELS)[source]
    assert shape.weights == pytest.approx(PUBLISHED[source], rel=0.011)


def test_every_model_that_a_recipe_names_is_known() -> None:
    for name in recipes.names(ROOT):
        pretrained = recipes.settings_with(name, ROOT).models.pretrained
        for entry in [] if pretrained is None else [*pretrained.teachers.values(), *pretrained.students.values()]:
            if isinstance(entry, Parts):
                assert entry.tower.source in shapes.TOWERS and entry.language_model.source in shapes.LANGUAGE_MODELS
            elif isinstance(entry, Checkpoint) and entry.revision is not None:
                assert entry.source in shapes.MODELS


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"])
def test_a_downloaded_configuration_says_the_shape(family: str) -> None:
    shape = shapes.load_shape(toy.folder(family))
    assert shape is not None
    held = sum(parameter.numel() for parameter in toy.loaded(family).model.parameters())
    assert 0.94 * held < shape.weights <= held  # at this size norms and biases are some per cent


def test_a_family_without_a_rule_is_not_guessed_at() -> None:
    assert shapes.load_shape(toy.folder("gemma3")) is None


def test_the_reckoned_image_has_the_visual_tokens_of_the_processors_own_rules() -> None:
    width, height = shapes.IMAGE
    for source, unit in (("Qwen/Qwen2.5-VL-7B-Instruct", 28), ("Qwen/Qwen3-VL-2B-Instruct", 32)):
        pixels = tf.Qwen2VLImageProcessorPil(
            patch_size=unit // 2, merge_size=2, size={"shortest_edge": 56 * 56, "longest_edge": 28**2 * 1280}
        )
        grid = pixels(images=[toy.image(width, height)], return_tensors="pt")["image_grid_thw"]
        assert shapes.MODELS[source].visual == int(torch.prod(grid)) // 4
    assert shapes.SIGLIP.tokens == 729 and math.isqrt(729) == 27
    side, padding = 54, (54 - int(height * 54 / width)) // 2  # LLaVA-OneVision: 2 x 2 tiles, less the rows of padding
    rows = side - 2 * padding
    assert shapes.MODELS["llava-hf/llava-onevision-qwen2-0.5b-ov-hf"].visual == 729 + rows * (side + 1)
