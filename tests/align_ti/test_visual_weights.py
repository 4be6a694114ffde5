"""The weights of the visual tokens."""

from __future__ import annotations

import torch

from components.align_ti.visual_weights import uniform_attention, visual_weights

VISUAL = torch.tensor([[False, True, True, True, False], [False] * 5, [True, True, False, False, False]])


def test_visual_weights_sum_to_one_over_each_image_and_keep_its_ratios() -> None:
    attention = torch.tensor([[0.1, 0.3, 0.1], [0.0, 0.0, 0.0], [0.2, 0.6, 0.0]])
    weights = visual_weights(attention, VISUAL)
    torch.testing.assert_close(weights, torch.tensor([0.2, 0.6, 0.2, 0.25, 0.75]))


def test_an_image_without_attention_and_the_control_arm_weigh_all_tokens_alike() -> None:
    wanted = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.5, 0.5])
    torch.testing.assert_close(visual_weights(torch.zeros(3, 3), VISUAL), wanted)
    torch.testing.assert_close(visual_weights(uniform_attention(VISUAL), VISUAL), wanted)
