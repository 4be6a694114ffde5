"""Registry of loss terms: terms/NAME.py holds one class, `Term`, and an arm selects it by name (docs/add_a_term.md).

Imports are lazy: only named terms are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from annotated_types import Ge, Interval

from components.align_ti.watch import Watch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from components.align_ti.batch import Batch
    from components.align_ti.step_outputs import StepOutputs

CORE = ("sft", "kd", "iva", "tpa")  # terms of the paper, reported by every training, in this order

NOTHING = Watch()
NonNegative = Annotated[float, Ge(0)]  # bounds of options, checked when params/ are read
Ratio = Annotated[float, Interval(ge=0, le=1)]
Share = Annotated[float, Interval(gt=0, le=1)]


@dataclass(frozen=True)
class View:
    """Additional pass over an edited batch; `edit` must keep shapes and masks."""

    name: str
    edit: Callable[[Batch], Batch]
    student: bool = True
    teacher: bool = True


@dataclass(frozen=True)
class Needs:
    """Inputs of a term beyond the student's pass over the sequence.

    Args:
        teacher: teacher pass over the sequence, or its cached signals.
        response: logits at the rows that predict the response.
        visual: logits at the visual rows.
        attention: teacher attention that weights visual tokens, by `iva.weighting`.
        ribbon: alternatives, and a pass of both models over them.
        live: teacher hidden states or full logits, which no cache holds.
        gold: the data's answers; generated ones do not replace them.
        edits: student pass over edited samples.
        evidence: kinds of the teacher's evidence, which `cache_teacher` keeps if params/distill.yaml requests them.
        linear: heads without soft-capped logits.
        in_student: student attention maps and hidden states at chosen layers.
        in_teacher: teacher attention maps and hidden states at chosen layers.
        views: edited batches, one additional pass each.
    """

    teacher: bool = True
    response: bool = True
    visual: bool = False
    attention: bool = False
    ribbon: bool = False
    live: bool = False
    gold: bool = False
    edits: bool = False
    evidence: frozenset[str] = frozenset()
    linear: bool = False
    in_student: Watch = NOTHING
    in_teacher: Watch = NOTHING
    views: tuple[View, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        flags = {f.name: getattr(self, f.name) | getattr(other, f.name) for f in fields(self) if f.name != "views"}
        return Needs(**flags, views=tuple(dict.fromkeys(self.views + other.views)))

    @property
    def live_teacher(self) -> bool:
        """True if cached teacher signals do not suffice."""
        return self.live or self.ribbon or bool(self.in_teacher) or any(view.teacher for view in self.views)


class Term(Protocol):
    """Interface of a term: a frozen dataclass whose fields are its options, each with a default."""

    @property
    def needs(self) -> Needs: ...
    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        """() number of units in this batch, the mean's denominator. `draws`: () counted alternatives, None without a ribbon."""

    def loss(self, outputs: StepOutputs) -> Tensor:
        """() loss summed over those units."""


@runtime_checkable
class DepthAware(Protocol):
    """Interface of a term that picks its layers by a rule, by the number of decoder layers of both models."""

    def at_depth(self, student_layers: int, teacher_layers: int) -> Term: ...


@runtime_checkable
class Trained(Protocol):
    """Interface of a term with a trained module, `outputs.modules[NAME]`.

    Widths are hidden widths; the teacher's is None without a live teacher.
    """

    def module(self, student_width: int, teacher_width: int | None) -> nn.Module: ...


@runtime_checkable
class LossAware(Protocol):
    """Interface of a term module whose state depends on past losses; it belongs in buffers, so that checkpoints hold it."""

    def stepped(self, loss: Tensor, progress: float) -> None:
        """Called after each training step with the term's global mean () and the step's `outputs.progress`."""


@cache
def names() -> tuple[str, ...]:
    """Names of all terms, one per file of this folder."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def term_class(name: str) -> Any:
    """`Term` of terms/NAME.py. Raises ValueError listing the known terms if there is none."""
    if name not in names():
        raise ValueError(f"no loss term is called {name!r}; there are {', '.join(names())} (components/align_ti/terms)")
    return import_module(f"{__name__}.{name}").Term


def computed(weights: Iterable[str]) -> list[str]:
    """Names of the terms to compute for those with a positive weight; L_tpa adds L_kd, which shares its rows."""
    return sorted({*weights, "kd"} if "tpa" in weights else {*weights})


def needs_of(names: Iterable[str]) -> tuple[Needs, ...]:
    """Needs of terms under default options."""
    return tuple(term_class(name)().needs for name in names)


def union(needs: Iterable[Needs]) -> Needs:
    """Union of needs."""
    combined = Needs(teacher=False, response=False)
    for term_needs in needs:
        combined |= term_needs
    return combined


def responses(batch: Batch, draws: Tensor | None = None) -> Tensor:
    """() number of response tokens in the batch: `Term.units` of most terms."""
    return batch.response[:, 1:].sum().float()


def images(batch: Batch, draws: Tensor | None = None) -> Tensor:
    """() number of images in the batch: `Term.units` of terms over images."""
    return batch.pictures.amax(1).sum().float()
