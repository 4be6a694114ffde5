"""Loss terms by name: terms/NAME.py holds one class, `Term`, and an arm uses it by naming it (docs/add_a_term.md).

Nothing is imported but the terms that somebody names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from components.align_ti.watch import Watch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from components.align_ti.batch import Batch
    from components.align_ti.seen import Seen

CORE = ("sft", "kd", "iva", "tpa")  # the paper's, reported by every training, in this order

NOTHING = Watch()


@dataclass(frozen=True)
class View:
    """One more pass over the batch, edited; `edit` must leave its shapes and masks alone."""

    name: str
    edit: Callable[[Batch], Batch]
    student: bool = True
    teacher: bool = True


@dataclass(frozen=True)
class Needs:
    """What the step has to compute for a term beyond the student's pass over the sequence.

    Args:
        teacher: its pass over the sequence.
        response: logits of the rows that predict the response.
        visual: logits of the visual rows.
        attention: the weights of each image's tokens, from the teacher's attention at the IRS layer.
        ribbon: alternatives, and both models after each.
        live: the teacher's hidden states or whole logits, which no cache has.
        gold: the data's answers, which no other answer replaces.
        edits: the student's pass over edited samples.
        in_student: attention maps and hidden states of chosen layers of the student.
        in_teacher: the same of the teacher.
        views: edited batches for one more pass each.
    """

    teacher: bool = True
    response: bool = True
    visual: bool = False
    attention: bool = False
    ribbon: bool = False
    live: bool = False
    gold: bool = False
    edits: bool = False
    in_student: Watch = NOTHING
    in_teacher: Watch = NOTHING
    views: tuple[View, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            **{field.name: getattr(self, field.name) or getattr(other, field.name) for field in fields(self)[:8]},
            in_student=self.in_student | other.in_student,
            in_teacher=self.in_teacher | other.in_teacher,
            views=tuple(dict.fromkeys(self.views + other.views)),
        )

    @property
    def live_teacher(self) -> bool:
        """Whether no cache of the teacher's signals serves."""
        return self.live or self.ribbon or bool(self.in_teacher) or any(view.teacher for view in self.views)


class Term(Protocol):
    """A frozen dataclass whose fields are the term's options, each with a default."""

    @property
    def needs(self) -> Needs: ...
    def units(self, batch: Batch, draws: Tensor | None) -> Tensor:
        """() what the term's mean is over, in this batch. `draws`: () alternatives that count, None without a ribbon."""

    def loss(self, seen: Seen) -> Tensor:
        """() sum over those units."""


@runtime_checkable
class Trained(Protocol):
    """A term that trains a module of its own beside the student; `seen.modules[NAME]` is it.

    The widths are those of hidden states; the teacher's is None where it is not live.
    """

    def module(self, student_width: int, teacher_width: int | None) -> nn.Module: ...


@runtime_checkable
class Follows(Protocol):
    """A term's module whose state follows the loss from step to step; buffers, for a checkpoint to hold it."""

    def stepped(self, loss: Tensor, progress: float) -> None:
        """After a step of the training: its global mean (), and `seen.progress` as the step had it."""


def names() -> list[str]:
    """The terms that there are: the files of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def known(name: str) -> str:
    """`name`. Raises ValueError listing the terms that there are if it is none of them."""
    if name not in names():
        raise ValueError(f"no loss term is called {name!r}; there are {', '.join(names())} (components/align_ti/terms)")
    return name


def term_class(name: str) -> Any:
    """`Term` of terms/NAME.py. Raises ValueError if there is none."""
    return import_module(f"{__name__}.{known(name)}").Term


def computed(weights: Iterable[str]) -> list[str]:
    """The terms computed for those that weigh something: L_kd besides, where L_tpa has its rows."""
    return sorted({*weights, "kd"} if "tpa" in weights else {*weights})


def needs_of(names: Iterable[str]) -> tuple[Needs, ...]:
    """Of terms without options."""
    return tuple(term_class(name)().needs for name in names)


def union(needs: Iterable[Needs]) -> Needs:
    """What all of them need together."""
    together = Needs(teacher=False, response=False)
    for each in needs:
        together |= each
    return together


def responses(batch: Batch) -> Tensor:
    """() response tokens."""
    return batch.response[:, 1:].sum().float()


def images(batch: Batch) -> Tensor:
    """() images of all samples."""
    return batch.pictures.amax(1).sum().float()
