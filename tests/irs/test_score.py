"""IRS against its definition and its two extremes."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.irs.score import irs_scores


def test_equal_attention_scores_zero() -> None:
    same = torch.rand(1, 5, 1, 9).expand(3, 5, 4, 9)
    torch.testing.assert_close(irs_scores(same), torch.zeros(3, 5), atol=1e-6, rtol=0)


def test_disjoint_attention_scores_one() -> None:
    torch.testing.assert_close(irs_scores(torch.eye(4).expand(2, 3, 4, 4)), torch.ones(2, 3))


@given(seed=st.integers(0, 1000), images=st.integers(1, 4), instructions=st.integers(2, 5))
@settings(max_examples=30)
def test_equals_the_mean_over_pairs(seed: int, images: int, instructions: int) -> None:
    a = torch.rand(2, images, instructions, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    per_image = irs_scores(a)
    for layer in range(2):
        cosines = [
            [
                float(torch.nn.functional.cosine_similarity(a[layer, x, i], a[layer, x, j], dim=0))
                for i, j in combinations(range(instructions), 2)
            ]
            for x in range(images)
        ]
        for x in range(images):
            assert float(per_image[layer, x]) == pytest.approx(1 - sum(cosines[x]) / len(cosines[x]))


def test_scale_of_the_attention_does_not_matter() -> None:
    """Layers differ in how much attention falls on the image at all; IRS is about where it falls."""
    a = torch.rand(1, 2, 3, 5) + 0.01
    torch.testing.assert_close(irs_scores(a * 1e-4), irs_scores(a))


def test_refuses_what_has_no_pair_and_what_nobody_looked_at() -> None:
    with pytest.raises(ValueError, match=r"got 3 image\(s\) with 1 instruction"):
        irs_scores(torch.rand(2, 3, 1, 4))
    with pytest.raises(ValueError, match="no attention at all"):
        irs_scores(torch.zeros(2, 3, 2, 4))
