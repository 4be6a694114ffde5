"""What the stage `check_rows` writes of a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from components.dataset.shards import Sample, Samples
from components.io import sha256
from components.records.dataset import Manifest
from components.records.paths import DATASET, ROWS, Split
from components.records.rows import TriedRows
from components.rows.judge import VERDICT


def keep_all(dataset: Path = DATASET, tokens: Callable[[Sample], int] = lambda _: 0) -> None:
    """Verdicts that leave nothing out, beside `dataset`, where stages look for them."""
    manifest, target = Manifest.read(dataset / "manifest.json"), dataset.with_name("rows")
    target.mkdir(exist_ok=True)
    for split in manifest.splits:
        verdict = [(len(sample.turns), tokens(sample), 0) for sample in Samples(dataset, split, check=False)]
        np.save(target / f"{split}.npy", np.array(verdict, dtype=VERDICT))
    hashes = {split: sha256([target / f"{split}.npy"]) for split in manifest.splits}
    TriedRows(digest=manifest.digest, max_length=0, tried_with=[], splits={}, sha256=hashes).write(target / "rows.json")


def rewrite(split: Split, verdicts: np.ndarray) -> None:
    """Other verdicts on a split, with their hash."""
    np.save(ROWS / f"{split}.npy", verdicts)
    tried = TriedRows.read(ROWS / "rows.json")
    hashes = tried.sha256 | {split: sha256([ROWS / f"{split}.npy"])}
    tried.model_copy(update={"sha256": hashes}).write(ROWS / "rows.json")
