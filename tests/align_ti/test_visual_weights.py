"""The weights of the visual tokens."""

from __future__ import annotations

import pytest
import torch

from components.align_ti.visual_weights import changed, concentration, sampled, uniform_attention, visual_weights

VISUAL = torch.tensor([[0, 1, 1, 1, 0], [0] * 5, [1, 1, 0, 0, 0]])


def test_visual_weights_sum_to_one_over_each_image_and_keep_its_ratios() -> None:
    attention = torch.tensor([[0.1, 0.3, 0.1], [0.0, 0.0, 0.0], [0.2, 0.6, 0.0]])
    weights = visual_weights(attention, VISUAL)
    torch.testing.assert_close(weights, torch.tensor([0.2, 0.6, 0.2, 0.25, 0.75]))


def test_an_image_without_attention_and_the_control_arm_weigh_all_tokens_alike() -> None:
    expected = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.5, 0.5])
    torch.testing.assert_close(visual_weights(torch.zeros(3, 3), VISUAL), expected)
    torch.testing.assert_close(visual_weights(uniform_attention(VISUAL), VISUAL), expected)


def test_permuted_weights_are_the_images_own_in_an_order_that_its_id_gives() -> None:
    pictures = torch.ones(2, 12, dtype=torch.long)
    pictures[1, 9:] = 0
    attention = torch.rand(2, 12) * pictures
    permuted = changed(attention, pictures, ["a", "b"], "permuted")
    assert torch.equal(permuted[1, :9].sort().values, attention[1, :9].sort().values) and not permuted[1, 9:].any()
    assert not torch.equal(permuted, attention)
    alone = changed(attention[1:, :9], pictures[1:, :9], ["b"], "permuted")
    assert torch.equal(alone, permuted[1:, :9])


def test_sinks_are_taken_away_or_left_alone() -> None:
    pictures = torch.ones(2, 20, dtype=torch.long)
    attention = torch.linspace(0.01, 0.02, 20).repeat(2, 1)
    attention[0, 3] = 1.0
    without, alone = (changed(attention, pictures, ["a", "b"], how) for how in ("sinks_removed", "sinks_alone"))
    torch.testing.assert_close(without + alone, attention)
    assert alone.nonzero().tolist() == [[0, 3]]
    torch.testing.assert_close(visual_weights(alone, pictures)[20:], torch.full((20,), 0.05))


def test_concentration_is_summed_over_images() -> None:
    pictures = torch.ones(3, 8, dtype=torch.long)
    pictures[1] = 0
    weights = torch.cat([torch.full((8,), 1 / 8), torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0])])
    statistics = {name: float(value) for name, value in concentration(weights, pictures).items()}
    assert statistics == pytest.approx({"images": 2, "effective_tokens": 10, "top5": 5 / 8 + 1})


def test_sampled_rows_have_the_mean_of_all_and_do_not_depend_on_the_batch() -> None:
    pictures = torch.zeros(2, 14, dtype=torch.long)
    pictures[0, 1:9], pictures[0, 10:14], pictures[1, :5] = 1, 2, 1
    weights = visual_weights(torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) ** 4, pictures)
    mean = torch.zeros(2, 14)
    for key in range(400):
        mask, drawn = sampled(weights, pictures, [key, key + 1000], rows=4)
        placed = torch.zeros(2, 14).masked_scatter(mask, drawn)
        torch.testing.assert_close(placed[0, 1:9].sum(), torch.tensor(1.0))
        torch.testing.assert_close(placed[0, 10:14], weights[8:12])  # no more tokens than draws: all of them
        alone_mask, alone_weights = sampled(weights[12:], pictures[1:], [key + 1000], rows=4)
        assert torch.equal(alone_mask[0], mask[1]) and torch.equal(alone_weights, drawn[-len(alone_weights) :])
        mean += placed / 400
    torch.testing.assert_close(mean[pictures > 0], weights, rtol=0, atol=0.01)


def test_each_of_several_images_is_a_unit_of_its_own() -> None:
    pictures = torch.tensor([[1, 1, 0, 2, 2, 2, 3], [0, 1, 1, 0, 0, 0, 0]])
    attention = torch.tensor([[0.1, 0.3, 0.0, 0.0, 0.0, 0.2], [0.5, 0.5, 0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([0.25, 0.75, 1 / 3, 1 / 3, 1 / 3, 1.0, 0.5, 0.5])
    torch.testing.assert_close(visual_weights(attention, pictures), expected)
