"""Intervals that cover, p values that are fair, and pairing and clustering that matter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from components.errors import DataError
from components.evaluate.statistics import (
    ScoreArrays,
    average_over_seeds,
    bootstrap,
    detectable,
    holm,
    interval,
    mcnemar,
    noise,
    noise_unpaired,
    p_value,
    seed_deviation,
)

IMAGES, PER_IMAGE = 80, 4
CLUSTERS = np.repeat(np.arange(IMAGES), PER_IMAGE)
ONE_KIND = np.zeros(IMAGES * PER_IMAGE, dtype=int)


def answers(random: np.random.Generator, spread: float, arms: int = 1) -> NDArray[np.bool_]:
    """(A, N) right answers at rate 0.6 on average; questions of one image share their difficulty to the extent of `spread`."""
    rate = np.clip(0.6 + spread * random.choice([-1.0, 1.0], IMAGES), 0, 1)[CLUSTERS]
    return random.random((arms, len(CLUSTERS))) < rate


def resampled(correct: NDArray[np.bool_], clusters: NDArray[np.int_] = CLUSTERS, seed: int = 0) -> NDArray[np.float64]:
    """(B, A)"""
    return bootstrap(correct, clusters, ONE_KIND, 400, seed)[1].overall


def width(values: NDArray[np.float64]) -> float:
    low, high = interval(values, 0.95)
    return high - low


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        low, high = interval(resampled(answers(random, spread=0.3), seed=trial)[:, 0], 0.95)
        covered += low <= 0.6 <= high
    assert 0.90 <= covered / 300 <= 0.99


def test_interval_that_ignores_images_is_too_narrow() -> None:
    correct = answers(np.random.default_rng(2), spread=0.35)
    by_image = width(resampled(correct)[:, 0])
    by_sample = width(resampled(correct, clusters=np.arange(len(CLUSTERS)))[:, 0])
    assert by_image > 1.15 * by_sample


def test_paired_interval_is_narrower_when_arms_err_on_the_same_questions() -> None:
    random = np.random.default_rng(3)
    first = answers(random, spread=0.2)[0]
    second = np.where(random.random(len(first)) < 0.1, ~first, first)
    draws = resampled(np.stack([first, second]))
    paired = width(draws[:, 0] - draws[:, 1])
    unpaired = width(draws[:, 0] - resampled(second[None], seed=99)[:, 0])
    assert paired < 0.7 * unpaired


def test_p_values_are_uniform_when_nothing_differs() -> None:
    random = np.random.default_rng(4)
    p_values = []
    for trial in range(300):
        draws = resampled(answers(random, spread=0.2, arms=2), seed=trial)
        p_values.append(p_value(draws[:, 0] - draws[:, 1]))
    for level in (0.1, 0.25, 0.5, 0.75):
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=0.08)


def test_identical_arms_differ_by_exactly_nothing() -> None:
    correct = answers(np.random.default_rng(5), spread=0.2)
    draws = resampled(np.concatenate([correct, correct]))
    difference = draws[:, 0] - draws[:, 1]
    assert interval(difference, 0.95) == (0.0, 0.0)
    assert p_value(difference) == 1.0


def test_a_clear_lead_has_the_smallest_p_the_resamples_can_show() -> None:
    correct = np.stack([np.ones(len(CLUSTERS)), answers(np.random.default_rng(6), spread=0.2)[0]])
    draws = resampled(correct)
    assert p_value(draws[:, 0] - draws[:, 1]) == 2 / 401


def test_interval_and_p_value_agree_about_zero() -> None:
    random = np.random.default_rng(7)
    for shift in np.linspace(0, 0.2, 40):
        difference = random.normal(shift, 0.06, 2000)
        low, high = interval(difference, 0.95)
        if abs(low) > 0.003:  # at the very edge the quantile interpolates between two resamples
            assert (low > 0 or high < 0) == (p_value(difference) < 0.05)


def test_scores_per_kind_and_their_average() -> None:
    correct = [[1, 1, 0, 1], [0, 0, 0, 1]]
    observed, draws = bootstrap(correct, [0, 0, 1, 1], [0, 0, 0, 1], 50, seed=1)
    np.testing.assert_allclose(observed.overall, [3 / 4, 1 / 4])
    np.testing.assert_allclose(observed.per_kind, [[2 / 3, 1], [0, 1]])
    np.testing.assert_allclose(observed.average, [5 / 6, 1 / 2])
    without_kind_1 = np.isnan(draws.per_kind[:, 0, 1])
    assert without_kind_1.any(), "image 0 drawn twice holds no question of kind 1"
    np.testing.assert_allclose(draws.average[without_kind_1, 0], 1.0)
    assert not np.isnan(draws.overall).any()


def test_same_seed_same_resamples_and_blocks_are_whole() -> None:
    correct = answers(np.random.default_rng(8), spread=0.1)
    first, second = (bootstrap(correct, CLUSTERS, ONE_KIND, 601, seed=3)[1].overall for _ in range(2))
    assert first.shape == (601, 1)
    np.testing.assert_array_equal(first, second)


def test_one_image_is_refused() -> None:
    with pytest.raises(DataError, match="two or more images"):
        bootstrap([[1, 0]], [0, 0], [0, 1], 10, seed=0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@hypothesis_settings(max_examples=60)
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    ranked = [q for _, q in sorted(zip(p_values, adjusted, strict=True), key=lambda pair: pair[0])]
    assert ranked == sorted(ranked)


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


@pytest.mark.parametrize(
    ("only_left", "only_right", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 2 / 32), (1, 7, 2 * 9 / 256), (8, 1, 2 * 10 / 512)],  # tails of the fair coin by hand
)
def test_mcnemar_is_the_fair_coin_on_the_questions_that_divide(only_left: int, only_right: int, p: float) -> None:
    left = [True] * only_left + [False] * only_right + [True] * 50 + [False] * 50
    right = [False] * only_left + [True] * only_right + [True] * 50 + [False] * 50
    assert mcnemar(left, right) == pytest.approx(p)
    assert mcnemar(right, left) == pytest.approx(p)


def test_noise_of_1000_questions_of_which_arms_divide_on_94() -> None:
    """With 1,000 independent questions, arms that differ on 9.4% of them have a gap of 1.9 points for noise."""
    random = np.random.default_rng(0)
    draws = random.multinomial(1000, [0.047, 0.047, 0.906], size=20_000)
    differences = (draws[:, 0] - draws[:, 1]) / 1000
    assert noise(differences, 0.95) == pytest.approx(0.019, abs=2e-4)
    assert detectable(differences, 0.95, 0.8) == pytest.approx(0.019 * 2.8016 / 1.96, abs=3e-4)


def test_a_detectable_gap_is_detected_as_often_as_promised() -> None:
    random = np.random.default_rng(4)
    gap = detectable(random.normal(0, 1, 100_000), 0.95, 0.8)
    detected = random.normal(gap, 1, 100_000) > noise(random.normal(0, 1, 100_000), 0.95)
    assert detected.mean() == pytest.approx(0.8, abs=0.01)


def test_noise_of_two_published_scores() -> None:
    assert noise_unpaired(0.5, 1000, 0.95) == pytest.approx(1.96 * (2 * 0.25 / 1000) ** 0.5, rel=1e-4)
    assert noise_unpaired(0.6, 12_578, 0.95) == pytest.approx(0.0121, abs=1e-4)


def scored(overall: NDArray[np.float64]) -> ScoreArrays:
    """The same as score overall, as average, and of the one kind."""
    return ScoreArrays(overall, overall, overall[..., None])


def test_ratios_are_of_sums_and_not_means_of_ratios() -> None:
    nats, tokens = [[4.0, 1.0, 0.0, 3.0]], [[1, 2, 3, 4]]
    observed, draws = bootstrap(nats, [0, 0, 1, 1], [0, 1, 0, 1], 50, seed=1, weights=tokens)
    np.testing.assert_allclose(observed.overall, [8 / 10])
    np.testing.assert_allclose(observed.per_kind, [[4 / 4, 4 / 6]])
    assert {round(float(value), 6) for value in draws.overall[:, 0]} == {round(5 / 3, 6), round(8 / 10, 6), round(3 / 7, 6)}


def test_two_seeds_give_the_interval_of_students_t() -> None:
    """Six arms of two seeds: the seeds' error has 6 degrees of freedom, and an arm's mean is of two of them."""
    runs = [[0], *([i, i + 1] for i in range(1, 13, 2))]
    scores = np.array([0.9, *np.tile([0.49, 0.51], 6)])  # within an arm a standard deviation of 0.02 / sqrt 2
    draws = np.random.default_rng(5).normal(scores, 1e-6, (40_000, 13))
    observed, resampled = average_over_seeds(scored(scores), scored(draws), runs, seed=1)
    assert observed.overall == pytest.approx([0.9, *[0.5] * 6])
    expected = 2 * 2.447 * (0.02 / 2**0.5) / 2**0.5
    for values in (resampled.overall[:, 1], resampled.average[:, 3], resampled.per_kind[:, 6, 0]):
        assert width(values) == pytest.approx(expected, rel=0.05)
    assert width(resampled.overall[:, 1] - resampled.overall[:, 2]) == pytest.approx(expected * 2**0.5, rel=0.05)
    assert width(resampled.overall[:, 0]) < 1e-4, "the teacher is given"


def test_one_seed_each_leaves_the_draws_as_they_are() -> None:
    draws = np.random.default_rng(5).normal([0.9, 0.5, 0.6], 0.01, (100, 3))
    _, resampled = average_over_seeds(scored(draws[0]), scored(draws), [[0], [1], [2]], seed=1)
    np.testing.assert_array_equal(resampled.overall, draws)
    assert np.isnan(seed_deviation(draws[0], [[0], [1], [2]]))


def test_seeds_cover_the_truth_about_as_often_as_their_interval_says() -> None:
    random, runs, covered = np.random.default_rng(6), [[0], [1, 2], [3, 4]], 0
    for trial in range(300):
        scores = random.normal([0.9, 0.5, 0.5, 0.6, 0.6], 0.01)
        _, resampled = average_over_seeds(scored(scores), scored(np.tile(scores, (2000, 1))), runs, seed=trial)
        low, high = interval(resampled.overall[:, 2] - resampled.overall[:, 1], 0.95)
        covered += low <= 0.1 <= high
    assert 0.91 <= covered / 300 <= 0.98
