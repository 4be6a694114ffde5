"""The weights of the visual tokens."""

from __future__ import annotations

import pytest
import torch

from components.align_ti.visual_weights import changed, concentration, uniform_attention, visual_weights

VISUAL = torch.tensor([[False, True, True, True, False], [False] * 5, [True, True, False, False, False]])


def test_visual_weights_sum_to_one_over_each_image_and_keep_its_ratios() -> None:
    attention = torch.tensor([[0.1, 0.3, 0.1], [0.0, 0.0, 0.0], [0.2, 0.6, 0.0]])
    weights = visual_weights(attention, VISUAL)
    torch.testing.assert_close(weights, torch.tensor([0.2, 0.6, 0.2, 0.25, 0.75]))


def test_an_image_without_attention_and_the_control_arm_weigh_all_tokens_alike() -> None:
    wanted = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.5, 0.5])
    torch.testing.assert_close(visual_weights(torch.zeros(3, 3), VISUAL), wanted)
    torch.testing.assert_close(visual_weights(uniform_attention(VISUAL), VISUAL), wanted)


def test_permuted_weights_are_the_images_own_in_an_order_that_its_id_gives() -> None:
    visual = torch.ones(2, 12, dtype=torch.bool)
    visual[1, 9:] = False
    attention = torch.rand(2, 12) * visual
    found = changed(attention, visual, ["a", "b"], "permuted")
    assert torch.equal(found[1, :9].sort().values, attention[1, :9].sort().values) and not found[1, 9:].any()
    assert not torch.equal(found, attention)
    alone = changed(attention[1:, :9], visual[1:, :9], ["b"], "permuted")
    assert torch.equal(alone, found[1:, :9])


def test_sinks_are_taken_away_or_left_alone() -> None:
    visual = torch.ones(2, 20, dtype=torch.bool)
    attention = torch.linspace(0.01, 0.02, 20).repeat(2, 1)
    attention[0, 3] = 1.0
    without, alone = (changed(attention, visual, ["a", "b"], how) for how in ("sinks_removed", "sinks_alone"))
    torch.testing.assert_close(without + alone, attention)
    assert alone.nonzero().tolist() == [[0, 3]]
    torch.testing.assert_close(visual_weights(alone, visual)[20:], torch.full((20,), 0.05))


def test_concentration_is_summed_over_images() -> None:
    visual = torch.ones(3, 8, dtype=torch.bool)
    visual[1] = False
    weights = torch.cat([torch.full((8,), 1 / 8), torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0])])
    found = {name: float(value) for name, value in concentration(weights, visual).items()}
    assert found == pytest.approx({"images": 2, "effective_tokens": 10, "top5": 5 / 8 + 1})
