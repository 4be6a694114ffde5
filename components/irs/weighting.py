"""Weighting of visual tokens: layer, rows, and the background if centred."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor

from components.errors import DataError
from components.records.irs import LayerChoice, Rows
from components.records.paths import IRS

if TYPE_CHECKING:
    from components.config.distill import Iva

BACKGROUND = IRS / "background.safetensors"  # per kind of rows (L, Nv); absent where images differ in their grids


@dataclass(frozen=True)
class Weighting:
    """Where the weights of L_iva come from."""

    layer: int
    rows: Rows = "all"
    background: Tensor | None = None  # (Nv,), of sum 1; None: the attention as it is
    gradient: bool = False  # not attention, but what each token adds to the answer

    @property
    def digest(self) -> str | None:
        """Of the background's values."""
        return None if self.background is None else hashlib.sha256(self.background.numpy().tobytes()).hexdigest()[:16]


def weighting(iva: Iva, choice: LayerChoice | None, depth: int = 1, seed: int = 0) -> Weighting:
    """What params/distill.yaml or an arm asks for. `uniform` looks at no layer; it gets the one that `irs` would, and the
    first where the search found none: then no arm that is trained looks at any (distill.searched_for). `depth`, the live
    teacher's layers, and the arm's `seed` are for layers by rule.

    Raises DataError if the layer search left no background though its choice needs one.
    """
    if iva.weighting == "layer":
        assert iva.layer is not None  # settings guarantee it
        rules = {"middle": depth // 2, "last": depth - 1, "random": random.Random(seed).randrange(depth)}
        return Weighting(rules[iva.layer] if isinstance(iva.layer, str) else iva.layer)
    if iva.weighting == "gradient":
        return Weighting(0, gradient=True)
    if choice is None:
        return Weighting(0)
    if iva.weighting != "searched":
        return Weighting(choice.layer)
    picked = choice.picked
    if picked.weighting == "mean":
        return Weighting(picked.layer, picked.rows)
    if not BACKGROUND.is_file():
        raise DataError(f"{BACKGROUND} is missing; `dvc repro search_layer` makes it")
    return Weighting(picked.layer, picked.rows, load_file(BACKGROUND)[picked.rows][picked.layer])
