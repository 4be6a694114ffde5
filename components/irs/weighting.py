"""Weighting of visual tokens in L_iva: layer, instruction rows, and the background if centred."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from components.errors import DataError
from components.io import write_bytes
from components.records.irs import LayerChoice, Picked, Rows
from components.records.paths import IRS

if TYPE_CHECKING:
    from components.config.distill import Iva

BACKGROUND = IRS / "background.safetensors"  # (L, Nv) per kind of rows; absent if visual grids differ


@dataclass(frozen=True)
class Weighting:
    """Source of the weights of L_iva."""

    layer: int
    rows: Rows = "all"
    background: Tensor | None = None  # (Nv,), sum 1; None: no centring
    gradient: bool = False  # gradient attribution to the answer instead of attention

    @property
    def digest(self) -> str | None:
        """Hash of the background's values; None without one."""
        return None if self.background is None else hashlib.sha256(self.background.numpy().tobytes()).hexdigest()[:16]


def weighting(iva: Iva, choice: LayerChoice | None, depth: int = 1, seed: int = 0) -> Weighting:
    """Weighting configured by params/distill.yaml or an arm. `uniform` reads no layer and gets that of `irs`, or layer 0 if
    the search found none, which no trained arm then reads (`layer_search_result` in distill.assemble). `depth`, the number of
    layers of the live teacher, and the arm's `seed` serve `layer: middle | last | random`.

    Raises DataError if the selected weighting is centred and the background file is missing or damaged.
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
    return Weighting(picked.layer, picked.rows, _background(picked))


def _background(picked: Picked) -> Tensor:
    if not BACKGROUND.is_file():
        raise DataError(f"{BACKGROUND} is missing; `dvc repro search_layer` makes it")
    try:
        return load_file(BACKGROUND)[picked.rows][picked.layer]
    except (SafetensorError, KeyError, IndexError) as error:
        raise DataError(f"{BACKGROUND} is damaged ({error}); delete it, and `dvc repro search_layer` makes it anew") from None


def save_backgrounds(backgrounds: dict[Rows, Tensor]) -> None:
    """Write the backgrounds (L, Nv) of the layer search, if there are any."""
    BACKGROUND.unlink(missing_ok=True)
    if backgrounds:
        write_bytes(BACKGROUND, save({rows: background.contiguous() for rows, background in backgrounds.items()}))
