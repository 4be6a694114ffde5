"""Perceptual hash (dHash, 64 bits) of images, and near neighbours by Hamming distance.

Difference hash: is each of 8 x 9 grey cells brighter than its neighbour to the right (Krawetz, hackerfactor.com, "Kind of
Like That", 2013). Looks that differ in at most NEAR bits belong to copies that were resized, recompressed or recoloured a
little, mostly: a near pair is a suspicion to look at, not a proof.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NEAR = 3  # bits of 64
SAMPLED = (144, 128)  # pixels that a large picture is thinned out to, 16 x 16 per cell: its average costs ten times as much
BANDS = np.arange(0, 64, 16, dtype=np.uint64)


def dhash(image: Image.Image) -> int:
    """Difference hash of an RGB image, 64 bits."""
    thinned = image.resize(SAMPLED, Image.Resampling.NEAREST) if image.width * image.height > 2**15 else image
    grey = np.asarray(thinned.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int(np.packbits(grey[:, 1:] > grey[:, :-1]).view(np.uint64)[0])


def nearest(hashes: NDArray[np.uint64], among: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each of `hashes` (n,), the index (n,) of the likest of `among` and the bits (n,) in which they differ.

    Only what is within NEAR bits is found; the index of the others is -1. Looks within NEAR < 4 bits agree in one of four
    bands of 16 bits, so only those that share a band are compared. Of equally like ones the first is taken.
    """
    best = np.full(len(hashes), len(among), dtype=np.int64)
    bits = np.full(len(hashes), NEAR + 1, dtype=np.int64)
    different, places = np.unique(among, return_index=True)
    for band in BANDS:
        keys = (hashes >> band).astype(np.uint16)
        order = np.argsort(keys, kind="stable")
        wanted = (different >> band).astype(np.uint16)
        first = np.searchsorted(keys[order], wanted, "left")
        last = np.searchsorted(keys[order], wanted, "right")
        for i in np.flatnonzero(last > first):
            rivals = order[first[i] : last[i]]
            distances = np.bitwise_count(hashes[rivals] ^ different[i]).astype(np.int64)
            closer = (distances < bits[rivals]) | ((distances == bits[rivals]) & (places[i] < best[rivals]))
            closer &= distances <= NEAR
            bits[rivals[closer]], best[rivals[closer]] = distances[closer], places[i]
    best[bits > NEAR] = -1
    return best, bits
