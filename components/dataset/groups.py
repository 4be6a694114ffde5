"""Groups of images that rows show together, by pixel hash: all images of a group belong to one split."""

from __future__ import annotations

import json

from tqdm import tqdm

from components.config.data import DataLimits
from components.dataset.images import check
from components.dataset.readers import Place, Store
from components.errors import Refusal
from components.process import shared_out

TOGETHER = 200  # images per job


def groups(
    together: list[tuple[str, list[Place]]], stores: dict[str, Store], limits: DataLimits, workers: int
) -> dict[str, str]:
    """Union-find over pixel hashes: hash of an image -> smallest hash of its group.

    `together`: source and places of the images of each row that shows several. Unreadable images are in no group.
    """
    names = list(dict.fromkeys((source, json.dumps(place)) for source, places in together for place in places))
    jobs = [(start, names[start : start + TOGETHER], stores, limits) for start in range(0, len(names), TOGETHER)]
    digests: dict[tuple[str, str], str | None] = {}
    with tqdm(desc="prepare: pictures shown together", total=len(names), unit="image") as bar:
        for start, part_digests in shared_out(digested, jobs, workers):
            digests |= zip(names[start : start + TOGETHER], part_digests, strict=True)
            bar.update(len(part_digests))
    parent: dict[str, str] = {}

    def least(digest: str) -> str:
        while (above := parent.setdefault(digest, digest)) != digest:
            parent[digest] = parent[above]  # path halving
            digest = above
        return digest

    for source, places in together:
        known = [digest for place in places if (digest := digests[source, json.dumps(place)])]
        roots = sorted(map(least, known))
        parent |= dict.fromkeys(roots, roots[0]) if roots else {}
    return {digest: least(digest) for digest in parent}


def digested(
    start: int, names: list[tuple[str, str]], stores: dict[str, Store], limits: DataLimits
) -> tuple[int, list[str | None]]:
    digests: list[str | None] = []
    for source, place in names:
        try:
            content = stores[source].image(json.loads(place), limits.max_image_mib)
            digests.append(check(content, place, limits).sha256)
        except Refusal:  # raised again when its rows are stored
            digests.append(None)
    return start, digests
