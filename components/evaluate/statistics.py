"""Uncertainty of scores and differences: one bootstrap over images, shared by all arms.

Questions about one image are not independent, so whole images are drawn with replacement (a cluster bootstrap), and
every arm is scored on the same draws, so differences between arms are paired. Intervals are percentile intervals; a
p value is that interval inverted, so the two never contradict each other.
Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapters 8, 13 and 15.

Where arms were trained with several seeds, every draw of the images also gets a seed error: normal, its variance pooled
over all arms and itself drawn, so that an interval is as wide as Student's t at this number of seeds. (Resampling two or
three seeds would show half to two thirds of their variance.) Variance shared by seeds and images is counted twice, as in the
pigeonhole bootstrap (Owen, Annals of Applied Statistics, 2007): intervals err on the wide side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from components.errors import DataError

Interval = tuple[float, float]
BLOCK = 250  # resamples per block: bounds memory to BLOCK x images


@dataclass(frozen=True)
class ScoreArrays:
    """Scores of A arms on K kinds of questions, as observed or (with a leading axis B) as resampled."""

    overall: NDArray[np.float64]  # (..., A) over all samples
    average: NDArray[np.float64]  # (..., A) mean over the kinds present, each kind counting the same
    per_kind: NDArray[np.float64]  # (..., A, K); NaN where a resample holds no question of the kind


def bootstrap(
    values: ArrayLike,
    images: Sequence[Any],
    kinds: Sequence[Any],
    resamples: int,
    seed: int,
    weights: ArrayLike | None = None,
) -> tuple[ScoreArrays, ScoreArrays]:
    """Scores, sum of values over sum of weights, as observed and on `resamples` draws of the images.

    Args:
        values: (A, N) value of arm a on sample n: correctness, or nats.
        weights: (A, N) weights, for nats the token counts; None: 1 each, so that the score is a mean over samples.
        images: (N,) image of sample n; images are drawn in the order of their first samples.
        kinds: (N,) kind of sample n; scores per kind are in their sorted order.

    Raises:
        DataError: fewer than two images, so nothing to resample.
    """
    value_array = np.asarray(values, dtype=np.float64)
    weight_array = np.ones_like(value_array) if weights is None else np.asarray(weights, dtype=np.float64)
    codes = _codes(images, dict.fromkeys(images)), _codes(kinds, sorted(set(kinds)))
    sums, counts = (_per_image(part, *codes) for part in (value_array, weight_array))
    n_images = len(counts)
    if n_images < 2:
        raise DataError(f"intervals need samples about two or more images, not {n_images}; score a larger split")
    rng = np.random.default_rng(seed)
    blocks = [
        _score(rng.multinomial(n_images, np.full(n_images, 1 / n_images), size=min(BLOCK, resamples - start)), sums, counts)
        for start in range(0, resamples, BLOCK)
    ]
    observed = _score(np.ones((1, n_images)), sums, counts)
    return (
        ScoreArrays(observed.overall[0], observed.average[0], observed.per_kind[0]),
        ScoreArrays(*(np.concatenate([getattr(b, f.name) for b in blocks]) for f in fields(ScoreArrays))),
    )


def interval(resampled: NDArray[np.float64], confidence: float) -> Interval:
    """Percentile interval of the resampled values (B,); undefined ones (NaN) are left out."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def p_value(differences: NDArray[np.float64]) -> float:
    """Two-sided p value of "no difference" from resampled differences (B,): twice the smaller share at or past 0.

    Never below 2 / (B + 1), the resolution of B resamples.
    """
    smaller = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (1 + smaller) / (1 + len(differences)))


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjusted p values (Holm, 1979), which control the family-wise error rate."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1))
    return [float(p) for p in np.minimum(adjusted, 1.0)]


def average_over_seeds(
    observed: ScoreArrays, resampled: ScoreArrays, runs: Sequence[Sequence[int]], seed: int
) -> tuple[ScoreArrays, ScoreArrays]:
    """Scores of arms from those of their runs, which differ only in seed: means, and draws with the seed error.

    Args:
        runs: indices of each arm's runs. The first arm is the teacher, which is fixed and has no seed error.
    """
    degrees = sum(len(arm_runs) - 1 for arm_runs in runs)
    mean, draws = (_averaged(scored, runs) for scored in (observed, resampled))
    if not degrees:
        return mean, draws
    rng, resamples = np.random.default_rng(seed), len(resampled.overall)
    share = np.array([0.0, *(len(arm_runs) ** -0.5 for arm_runs in runs[1:])])
    scale = np.sqrt(degrees / rng.chisquare(degrees, size=(resamples, 1)))
    error = scale * share * rng.standard_normal((resamples, len(runs)))
    overall, average, per_kind = (seed_deviation(getattr(observed, f.name), runs) for f in fields(ScoreArrays))
    return mean, ScoreArrays(
        draws.overall + error * overall, draws.average + error * average, draws.per_kind + error[..., None] * per_kind
    )


def seed_deviation(scores: NDArray[np.float64], runs: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Standard deviation between runs of one arm, pooled over arms, from all runs' scores (R, ...); NaN without repeats."""
    degrees = sum(len(arm_runs) - 1 for arm_runs in runs)
    squares = sum(((scores[list(arm_runs)] - scores[list(arm_runs)].mean(0)) ** 2).sum(0) for arm_runs in runs)
    return np.sqrt(np.divide(squares, degrees)) if degrees else np.full(scores.shape[1:], np.nan)


def _averaged(scored: ScoreArrays, runs: Sequence[Sequence[int]]) -> ScoreArrays:
    def mean(scores: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.stack([scores.take(arm_runs, axis).mean(axis) for arm_runs in runs], axis)

    return ScoreArrays(mean(scored.overall, -1), mean(scored.average, -1), mean(scored.per_kind, -2))


def mcnemar(correct: ArrayLike, other_correct: ArrayLike) -> float:
    """McNemar's exact two-sided p value from each arm's correctness per question, (N,) bool (McNemar, 1947).

    Only discordant questions count, each a fair coin under the null hypothesis. Questions are assumed independent: use it where
    an image has one.
    """
    from scipy.stats import binomtest

    first, second = np.asarray(correct, dtype=bool), np.asarray(other_correct, dtype=bool)
    discordant = int((first & ~second).sum()), int((second & ~first).sum())
    return float(binomtest(min(discordant), sum(discordant)).pvalue) if any(discordant) else 1.0


def noise(differences: NDArray[np.float64], confidence: float) -> float:
    """Smallest significant gap between two arms: half the interval of their resampled differences (B,)."""
    low, high = interval(differences, confidence)
    return (high - low) / 2


def detectable(differences: NDArray[np.float64], confidence: float, power: float) -> float:
    """Minimum detectable difference: the true gap that exceeds `noise` with probability `power` on a sample of this size."""
    from scipy.stats import norm

    return noise(differences, confidence) * float(1 + norm.ppf(power) / norm.ppf(0.5 + confidence / 2))


def noise_unpaired(share: float, items: int, confidence: float) -> float:
    """Smallest significant gap between two unpaired scores near `share`, from `items` answers each.

    Questions are assumed independent; where several share an image the noise is larger. Units: shares, as `share`.
    """
    from scipy.stats import norm

    return float(norm.ppf(0.5 + confidence / 2) * np.sqrt(2 * share * (1 - share) / items))


def _codes(values: Iterable[Any], order: Iterable[Any]) -> NDArray[np.int_]:
    code = {value: index for index, value in enumerate(order)}
    return np.array([code[value] for value in values])


def _per_image(values: NDArray[np.float64], images: NDArray[np.int_], kinds: NDArray[np.int_]) -> NDArray[np.float64]:
    """(X, A, K) sums of (A, N) values per image and kind: sufficient for resampling images."""
    shape = (int(images.max()) + 1, int(kinds.max()) + 1)
    cell = images * shape[1] + kinds
    sums = [np.bincount(cell, weights=arm, minlength=shape[0] * shape[1]).reshape(shape) for arm in values]
    return np.stack(sums, axis=1)


def _score(draws: NDArray[Any], sums: NDArray[np.float64], counts: NDArray[np.float64]) -> ScoreArrays:
    """Scores with image x counted `draws[b, x]` times. Sums of right answers are sums of integers, hence exact."""
    total, count = ((draws @ part.reshape(len(part), -1)).reshape(len(draws), *part.shape[1:]) for part in (sums, counts))
    per_kind = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return ScoreArrays(total.sum(-1) / count.sum(-1), np.nanmean(per_kind, axis=-1), per_kind)
