"""Requests for forward hooks by loss terms: attention maps over visual tokens, and hidden states, of chosen layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Map:
    """Attention map of one layer: from a sample's instruction, visual or response rows to its Nv visual tokens, head mean.

    `each_row`: (B, rows, Nv), zero-padded; else the mean over the rows, (B, Nv).
    """

    layer: int
    rows: Literal["instruction", "visual", "response"] = "instruction"
    each_row: bool = False


@dataclass(frozen=True)
class Watch:
    """Attention maps and hidden states to capture in one forward pass. Layers count from 0, or back from -1, the last; a
    hidden state (B, T, d) is a layer's output."""

    maps: tuple[Map, ...] = ()
    hidden: tuple[int, ...] = ()

    @property
    def layers(self) -> set[int]:
        return {map.layer for map in self.maps} | set(self.hidden)

    def __or__(self, other: Watch) -> Watch:
        return Watch(tuple(dict.fromkeys(self.maps + other.maps)), tuple(dict.fromkeys(self.hidden + other.hidden)))

    def __bool__(self) -> bool:
        return bool(self.maps or self.hidden)


@dataclass
class Watched:
    """Captured attention maps and hidden states."""

    maps: dict[Map, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
