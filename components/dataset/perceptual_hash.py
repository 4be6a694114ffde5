"""Perceptual hash (dHash, 64 bits) of images, and nearest neighbours by Hamming distance.

Difference hash: one bit per neighbouring pair in each row of 8 x 9 grey cells, 1 if the right cell is brighter (Krawetz,
hackerfactor.com, "Kind of Like That", 2013). Hashes within NEAR bits mostly belong to resized, recompressed or slightly
recoloured copies: a near pair is a candidate for inspection, not a proof.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NEAR = 3  # bits of 64
SAMPLED = (144, 128)  # samples of a large image, 16 x 16 per cell: averaging all pixels costs ten times as much
BANDS = np.arange(0, 64, 16, dtype=np.uint64)


def dhash(image: Image.Image) -> int:
    """Difference hash of an RGB image, 64 bits."""
    thinned = image.resize(SAMPLED, Image.Resampling.NEAREST) if image.width * image.height > 2**15 else image
    grey = np.asarray(thinned.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int(np.packbits(grey[:, 1:] > grey[:, :-1]).view(np.uint64)[0])


def nearest(hashes: NDArray[np.uint64], among: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index (n,) in `among` of the nearest neighbour of each of `hashes` (n,), and their Hamming distance (n,).

    Index -1 if none is within NEAR bits. Hashes within NEAR < 4 bits agree in one of four bands of 16 bits, so only pairs
    that share a band are compared. Ties go to the lower index.
    """
    best = np.full(len(hashes), len(among), dtype=np.int64)
    bits = np.full(len(hashes), NEAR + 1, dtype=np.int64)
    different, places = np.unique(among, return_index=True)
    for band in BANDS:
        keys = (hashes >> band).astype(np.uint16)
        order = np.argsort(keys, kind="stable")
        band_values = (different >> band).astype(np.uint16)
        first = np.searchsorted(keys[order], band_values, "left")
        last = np.searchsorted(keys[order], band_values, "right")
        for i in np.flatnonzero(last > first):
            rivals = order[first[i] : last[i]]
            distances = np.bitwise_count(hashes[rivals] ^ different[i]).astype(np.int64)
            closer = (distances < bits[rivals]) | ((distances == bits[rivals]) & (places[i] < best[rivals]))
            closer &= distances <= NEAR
            bits[rivals[closer]], best[rivals[closer]] = distances[closer], places[i]
    best[bits > NEAR] = -1
    return best, bits
