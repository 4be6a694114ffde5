"""L_received: 1 - cos between both models' attention received by visual tokens, per layer. Units: samples with an image.

`rows: visual`, middle layers, without sinks: CompoDistill, arXiv 2510.12184. `rows: instruction`, first layer: Align-KD,
arXiv 2412.01282.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from components.align_ti.batch import Batch
from components.align_ti.seen import Seen
from components.align_ti.terms import Needs
from components.align_ti.watch import Map, Watch


@dataclass(frozen=True)
class Term:
    rows: Literal["visual", "instruction"] = "visual"
    # student layer, and the teacher layers whose mean map is its target
    layers: tuple[tuple[int, tuple[int, ...]], ...] = ((-2, (-2,)),)
    sinks: bool = False  # False: entries above mean + std of the sample's map, in either model, are excluded

    @property
    def needs(self) -> Needs:
        mine, theirs = [layer for layer, _ in self.layers], [layer for _, layers in self.layers for layer in layers]
        return Needs(response=False, in_student=Watch(self._maps(mine)), in_teacher=Watch(self._maps(theirs)))

    def _maps(self, layers: list[int]) -> tuple[Map, ...]:
        return tuple(Map(layer, self.rows, each_row=True) for layer in dict.fromkeys(layers))

    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        return self._looking(batch).sum().float()

    def _looking(self, batch: Batch) -> Tensor:
        """(B,) bool: samples with an image and rows that attend to it."""
        rows: Tensor = getattr(batch, self.rows)
        return batch.visual.any(1) & rows.any(1)

    def loss(self, seen: Seen) -> Tensor:
        batch, losses = seen.batch, [seen.zero]
        for sample in self._looking(batch).nonzero()[:, 0].tolist():
            R, Nv = int(getattr(batch, self.rows)[sample].sum()), int(batch.visual[sample].sum())
            for layer, of_teacher in self.layers:
                mine = seen.in_student.maps[Map(layer, self.rows, True)][sample, :R, :Nv]
                maps = [seen.in_teacher.maps[Map(one, self.rows, True)][sample, :R, :Nv] for one in of_teacher]
                losses.append(1 - F.cosine_similarity(*self._received(mine, torch.stack(maps).mean(0)), dim=0))
        return torch.stack(losses).sum() / len(self.layers)

    def _received(self, mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """(Nv,) each: column means of two (R, Nv) maps over the kept entries."""
        kept = torch.ones_like(mine)
        if not self.sinks:
            kept = ((mine <= mine.mean() + mine.std()) & (theirs <= theirs.mean() + theirs.std()) & (theirs > 0)).to(mine.dtype)
        rows = kept.sum(0).clamp_min(1)
        return (mine * kept).sum(0) / rows, (theirs * kept).sum(0) / rows
