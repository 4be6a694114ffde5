"""How sure a score or a difference is: one bootstrap over images, shared by all arms.

Questions about one image are not independent, so whole images are drawn with replacement (a cluster bootstrap), and
every arm is scored on the same draws, which is what makes a difference of two arms a paired one. Intervals are
percentile intervals; a p value is that interval inverted, so the two never contradict each other.
Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapters 8, 13 and 15.

Where an arm was trained with several seeds, seeds are drawn with replacement too, crossed with the images (the pigeonhole
bootstrap: Owen, Annals of Applied Statistics, 2007).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from components.errors import DataError

Interval = tuple[float, float]
BLOCK = 250  # resamples drawn at once: bounds memory by BLOCK x images


@dataclass(frozen=True)
class Scored:
    """Exact match of A arms on K kinds of questions, as observed or (with a leading axis B) as resampled."""

    overall: NDArray[np.float64]  # (..., A) over all samples
    per_kind: NDArray[np.float64]  # (..., A, K); NaN where a resample holds no question of the kind

    @property
    def average(self) -> NDArray[np.float64]:
        """(..., A) mean over the kinds present, each kind counting the same."""
        return np.nanmean(self.per_kind, axis=-1)


def bootstrap(correct: ArrayLike, images: ArrayLike, kinds: ArrayLike, resamples: int, seed: int) -> tuple[Scored, Scored]:
    """Scores as observed, and on `resamples` draws of the images.

    Args:
        correct: (A, N) whether arm a answered sample n right.
        images: (N,) which image sample n is about, 0..X-1, each occurring.
        kinds: (N,) which kind of question it is, 0..K-1, each occurring.

    Raises:
        DataError: fewer than two images, so nothing to draw from.
    """
    hits, counts = _per_image(np.asarray(correct, dtype=np.float64), np.asarray(images), np.asarray(kinds))
    total = len(counts)
    if total < 2:
        raise DataError(f"intervals need samples about two or more images, not {total}; score a larger split")
    random = np.random.default_rng(seed)
    blocks = [
        _score(random.multinomial(total, np.full(total, 1 / total), size=min(BLOCK, resamples - done)), hits, counts)
        for done in range(0, resamples, BLOCK)
    ]
    observed = _score(np.ones((1, total)), hits, counts)
    return (
        Scored(observed.overall[0], observed.per_kind[0]),
        Scored(np.concatenate([b.overall for b in blocks]), np.concatenate([b.per_kind for b in blocks])),
    )


def interval(resampled: NDArray[np.float64], confidence: float) -> Interval:
    """Percentile interval of the resampled values (B,); undefined ones (NaN) are left out."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def p_value(differences: NDArray[np.float64]) -> float:
    """Two-sided p of "no difference" from resampled differences (B,): twice the smaller share that lies at or past 0.

    Never below 2 / (B + 1): as many resamples say nothing about rarer events.
    """
    smaller = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (1 + smaller) / (1 + len(differences)))


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment: below alpha, a claim holds although this many were tested (Holm, 1979)."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in adjusted]


def over_seeds(draws: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """(B,) mean score of S arms that differ in their seed alone, seeds drawn anew each time, from their scores (B, S)."""
    resamples, seeds = draws.shape
    weights = np.random.default_rng(seed).multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    return (weights * draws).sum(axis=1) / seeds


def mcnemar(one: ArrayLike, other: ArrayLike) -> float:
    """Exact two-sided p that two arms are right equally often, from whether each is right on each question (N,), bool.

    Only questions on which they differ count, each being a fair coin if the arms are equal (McNemar, 1947). It takes questions
    for independent: use it where an image has one.
    """
    from scipy.stats import binomtest

    first, second = np.asarray(one, dtype=bool), np.asarray(other, dtype=bool)
    alone = int((first & ~second).sum()), int((second & ~first).sum())
    return float(binomtest(min(alone), sum(alone)).pvalue) if any(alone) else 1.0


def noise(differences: NDArray[np.float64], confidence: float) -> float:
    """The gap that two arms must exceed to be told apart on this test sample, from their resampled differences (B,)."""
    from scipy.stats import norm

    return float(norm.ppf(0.5 + confidence / 2) * differences.std(ddof=1))


def detectable(differences: NDArray[np.float64], confidence: float, power: float) -> float:
    """The true gap that would exceed `noise` with probability `power` on another sample of this size."""
    from scipy.stats import norm

    return float((norm.ppf(0.5 + confidence / 2) + norm.ppf(power)) * differences.std(ddof=1))


def noise_unpaired(share: float, items: int, confidence: float) -> float:
    """The gap between two scores near `share` that is noise when only the scores are known: `items` answers each, unpaired.

    Questions are taken for independent; where several share an image the noise is larger. Units: shares, as `share`.
    """
    from scipy.stats import norm

    return float(norm.ppf(0.5 + confidence / 2) * np.sqrt(2 * share * (1 - share) / items))


def _per_image(
    correct: NDArray[np.float64], images: NDArray[np.int_], kinds: NDArray[np.int_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Right answers (X, A, K) and questions (X, K) per image: all that a resample of images needs."""
    shape = (int(images.max()) + 1, int(kinds.max()) + 1)
    cell = images * shape[1] + kinds
    counts = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    hits = [np.bincount(cell, weights=arm, minlength=counts.size).reshape(shape) for arm in correct]
    return np.stack(hits, axis=1), counts.astype(np.float64)


def _score(weights: NDArray[Any], hits: NDArray[np.float64], counts: NDArray[np.float64]) -> Scored:
    """Scores when image x counts `weights[b, x]` times. All sums are of whole numbers, hence exact."""
    right = (weights @ hits.reshape(len(hits), -1)).reshape(len(weights), *hits.shape[1:])
    asked = (weights @ counts)[:, None, :]
    per_kind = np.divide(right, asked, out=np.full_like(right, np.nan), where=asked > 0)
    return Scored(right.sum(-1) / asked.sum(-1), per_kind)
