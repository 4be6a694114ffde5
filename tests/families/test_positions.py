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
        _, kept = vlm.plain(batch, vlm.features(batch), keep=True)
    T = batch.input_ids.shape[1]
    rows = torch.tensor([[3, 5], [2, 2], [T - 1, 4], [1, 9]])
    found = _gather_positions(kept.positions, rows)
    if kept.positions is None:
        assert torch.equal(found, rows)
        return "0, 1, 2, ..."
    if kept.positions.dim() == 2:
        start = int(kept.positions[0, 0])
        assert torch.equal(kept.positions, torch.arange(start, start + T)[None])
        assert torch.equal(found, rows + start)
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
            seen = expected[:, alone.pictures[0] == 1]
            assert seen[0].unique().numel() == 1 and seen[1].unique().numel() > 1 and seen[2].unique().numel() > 1
        assert torch.equal(kept.positions[:, row, :real], expected)
    for axis in range(3):
        assert torch.equal(found[axis], kept.positions[axis].gather(1, rows))
    return "time, height, width"


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_are_the_gold_tokens_own(family: str) -> None:
    assert check(family) == documented(family, TITLE)
