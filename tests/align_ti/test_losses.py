"""The four terms as sums, and the weights of the visual tokens."""

from __future__ import annotations

import pytest
import torch

from components.align_ti.head import Head
from components.align_ti.losses import TERMS, kd, sft, total, tpa
from components.align_ti.visual_weights import uniform_attention, visual_weights

VISUAL = torch.tensor([[False, True, True, True, False], [False] * 5, [True, True, False, False, False]])


def test_sft_is_the_sum_of_cross_entropies() -> None:
    rows, head, targets = torch.randn(5, 3), Head(torch.randn(7, 3)), torch.tensor([0, 6, 3, 3, 1])
    wanted = float(-head(rows).log_softmax(-1)[range(5), targets].sum())
    assert float(sft(rows, head, targets)) == pytest.approx(wanted, rel=1e-5)
    assert float(sft(rows[:0], head, targets[:0])) == 0


def test_kd_counts_only_the_rows_that_predict_a_response() -> None:
    assert float(kd(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True]))) == 5


def test_tpa_weighs_rows_by_how_often_they_were_drawn() -> None:
    text, hits = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])
    assert float(tpa(text, hits, torch.tensor([10.0, 20.0]), torch.tensor([2.0, 1.0]))) == 3 * 2 + 2 * 10 + 20


def test_visual_weights_sum_to_one_over_each_image_and_keep_its_ratios() -> None:
    attention = torch.tensor([[0.1, 0.3, 0.1], [0.0, 0.0, 0.0], [0.2, 0.6, 0.0]])
    weights = visual_weights(attention, VISUAL)
    torch.testing.assert_close(weights, torch.tensor([0.2, 0.6, 0.2, 0.25, 0.75]))


def test_an_image_without_attention_and_the_control_arm_weigh_all_tokens_alike() -> None:
    wanted = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.5, 0.5])
    torch.testing.assert_close(visual_weights(torch.zeros(3, 3), VISUAL), wanted)
    torch.testing.assert_close(visual_weights(uniform_attention(VISUAL), VISUAL), wanted)


def test_total_divides_each_term_by_its_own_count_and_survives_a_term_without_units() -> None:
    sums, counts = torch.tensor([6.0, 4.0, 0.0, 9.0]), torch.tensor([3.0, 4.0, 0.0, 2.0])
    weights = torch.tensor([1.0, 2.0, 5.0, 0.5])
    assert float(total(sums, counts, weights)) == pytest.approx(2.0 + 2.0 + 0.0 + 2.25)
    assert len(TERMS) == 4


def test_sft_gradient_by_finite_differences() -> None:
    rows, weight = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    assert torch.autograd.gradcheck(lambda x, w: sft(x, Head(w), torch.tensor([1, 4, 0, 2])), (rows, weight))
