"""Position ids of the plain pass, and of ribbon rows: those of the gold tokens that they stand in for, on every axis."""

from __future__ import annotations

import pytest
import torch

from components.models.vlm import VLM, _gather_positions
from tests.families import toy
from tests.families.table import documented

TITLE = "position ids"


def check(family: str) -> str:
    vlm, batch = VLM(toy.loaded(family).model), toy.batch(family)
    with torch.no_grad():
        _, cache = vlm.plain(batch, vlm.features(batch), keep=True)
    T = batch.input_ids.shape[1]
    rows = torch.tensor([[3, 5], [2, 2], [T - 1, 4], [1, 9]])
    gathered = _gather_positions(cache.positions, rows)
    if cache.positions is None:
        assert torch.equal(gathered, rows)
        return "0, 1, 2, ..."
    if cache.positions.dim() == 2:
        start = int(cache.positions[0, 0])
        assert torch.equal(cache.positions, torch.arange(start, start + T)[None])
        assert torch.equal(gathered, rows + start)
        return f"{start}, {start + 1}, {start + 2}, ..."
    for row, real in enumerate(batch.attention_mask.sum(1).tolist()):
        alone = toy.alone(family, row)
        if alone.pixel_values is None:
            expected = torch.arange(real).expand(3, real)
        else:
            expected, _ = vlm.model.model.get_rope_index(
                alone.input_ids, mm_token_type_ids=alone.visual.int(), image_grid_thw=alone.image_inputs["image_grid_thw"]
            )
            expected = expected[:, 0]
            of_image = expected[:, alone.pictures[0] == 1]
            assert of_image[0].unique().numel() == 1 and of_image[1].unique().numel() > 1 and of_image[2].unique().numel() > 1
        assert torch.equal(cache.positions[:, row, :real], expected)
    for axis in range(3):
        assert torch.equal(gathered[axis], cache.positions[axis].gather(1, rows))
    return "time, height, width"


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_are_the_gold_tokens_own(family: str) -> None:
    assert check(family) == documented(family, TITLE)
