"""Distillation step: forward passes of student and teacher that the arm's terms need; each term's sum and count.

L = sum over terms of weight x sum / count (docs/method.md, "Total"). A term is a sum over its own units and their
count, because a mean of means would depend on how the batch was split over devices and accumulation steps.

Route "continuation": each model runs once over the plain sequence; the ribbon's rows then continue over that pass's
key/value cache, gradients flowing through it, so that the pass which says what to draw is not an extra one. Route
"expanded", for where a cache cannot be kept (gradient checkpointing): the student draws in a pass without gradients, then
runs once over the sequence with the ribbon appended. Both give the same numbers (tests/align_ti/test_step.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from components.align_ti.batch import Batch, Edits, edits_of, predicting
from components.align_ti.cached import Cached
from components.align_ti.divergence import Divergence
from components.align_ti.head import CHUNK_MIB, Head, rows_per_chunk
from components.align_ti.ribbon import (
    Ribbon,
    continuation_mask,
    counted,
    draw,
    expanded_mask,
    fit,
    places,
    plan,
    probabilities,
    shuffled,
    uniforms,
)
from components.align_ti.seen import Seen
from components.align_ti.shared_weights import SharedWeights
from components.align_ti.terms import CORE, Follows, Needs, Term, Trained, computed, term_class, union
from components.align_ti.watch import Watch, Watched

SHARED_FROM = 10_000_000  # trained parameters: below, working out whole gradients twice is cheaper than keeping book of rows


class Student(Protocol):
    """A vision-language model seen as the method sees it. d is its width; hidden states are those before the head."""

    def features(self, batch: Batch) -> Any: ...
    def plain(self, batch: Batch, features: Any, keep: bool) -> tuple[Tensor, Any]: ...
    def continued(self, cache: Any, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor: ...
    def expanded(self, batch: Batch, features: Any, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor: ...
    def edited(self, edits: Edits) -> Tensor: ...
    def watched(self, batch: Batch, watch: Watch) -> AbstractContextManager[Watched]: ...
    @property
    def head(self) -> Head: ...
    @property
    def model(self) -> Any:
        """The underlying model: its configuration, the layers to shard, the parts to train. The method does not ask for it."""


class Teacher(Protocol):
    """The frozen teacher. `features` may be given the student's, when both have the same vision tower."""

    def features(self, batch: Batch, of_student: Any) -> Any: ...
    def plain(self, batch: Batch, features: Any, keep: bool, look: bool) -> tuple[Tensor, Any, Tensor | None]: ...
    def continued(self, cache: Any, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor: ...
    def watched(self, batch: Batch, watch: Watch) -> AbstractContextManager[Watched]: ...
    @property
    def head(self) -> Head: ...
    @property
    def vlm(self) -> Any:
        """The frozen model, for estimates of memory and for replays. The method does not ask for it."""

    @property
    def equal_weights(self) -> Tensor:
        """() long: images so far whose visual tokens weighed the same, for want of attention."""


class Signals(Protocol):
    """What the frozen teacher says of every sample, kept from an earlier pass: it needs no teacher here."""

    def look_up(self, batch: Batch, visual: bool, look: bool) -> tuple[Cached, Tensor | None]: ...


@dataclass(frozen=True)
class Method:
    """What to compute; the fields are those of params/distill.yaml and of an arm of params/study.yaml."""

    weights: dict[str, float]  # of terms by name; one that is absent or 0 is not computed
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a term, by its name: the fields of its `Term`
    kind: str = "forward"  # this and the next two: the divergence of terms that have none of their own
    mix: float = 0.5
    temperature: float = 1.0
    chunk_mib: float = CHUNK_MIB  # of float32 logits that are held at a time, of one model
    draws: int = 4
    source: str = "student"  # of the alternatives: student | teacher | gold
    replacement: bool = True
    draw_temperature: float = 1.0
    top_k: int | None = None  # draw among so many of the most likely tokens
    top_p: float | None = None  # and among the fewest whose probabilities reach this
    alternatives: str | None = None  # a control: shuffled | wrong
    max_expanded_length: int | None = None  # tokens of one sample with its alternatives; response steps beyond are left out
    eos: int = 0
    shared_vocabulary: int | None = None  # columns that both heads share; None: those of the narrower one
    route: str = "continuation"  # continuation | expanded

    @cached_property
    def terms(self) -> dict[str, Term]:
        """Those reported, in this order: the core terms, then others that weigh something."""
        active = (name for name, weight in self.weights.items() if weight > 0)
        return {name: self._term(name) for name in dict.fromkeys((*CORE, *active))}

    def _term(self, name: str) -> Term:
        options = dict(self.options.get(name, {}))
        if isinstance(options.get("divergence"), dict):
            options["divergence"] = Divergence(**options["divergence"])
        term: Term = term_class(name)(**options)
        return term

    @property
    def divergence(self) -> Divergence:
        return Divergence(self.kind, self.mix, self.temperature)

    @cached_property
    def needs(self) -> Needs:
        """Of all terms that weigh something."""
        return union(term.needs for name, term in self.terms.items() if self.weighs(name))

    def weighs(self, name: str) -> bool:
        return self.weights.get(name, 0) > 0

    def weight_vector(self, device: torch.device | None = None) -> Tensor:
        """The weights in the order of `terms`."""
        return torch.tensor([float(self.weights.get(name, 0)) for name in self.terms], device=device)


def total(sums: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
    """L from sums, counts over the global batch and weights, all in the order of `Method.terms`.

    A term without units (no image in the whole batch, every draw EOS) is 0.
    """
    return (weights * sums / counts.clamp_min(1)).sum()


@dataclass(frozen=True)
class Sums:
    """Sums and counts in the order of `Method.terms`, how many ribbon rows it took, and how many response steps a cap on the
    length left without alternatives."""

    sums: Tensor
    counts: Tensor
    ribbon_rows: int
    steps_left_out: int


class AlignTI(nn.Module):
    """The student with the method around it: the module to wrap in DDP or FSDP.

    Its parameters are the student's, and those of `term_modules`, which terms train for themselves and nobody exports.
    """

    progress = 0.0  # of the training, as the loop says before each step

    def __init__(self, student: Student, teacher: Teacher | None, method: Method, signals: Signals | None = None) -> None:
        """`signals` take the teacher's place where no term needs it live, under the forward divergence."""
        super().__init__()
        needs = method.needs
        asking = ", ".join(name for name, term in method.terms.items() if method.weighs(name) and term.needs.teacher)
        if teacher is None and signals is None and needs.teacher:
            raise ValueError(f"{asking} need a teacher")
        if signals is not None and (needs.live_teacher or any(kind != "forward" for kind in self._kinds(method))):
            raise ValueError(f"kept signals serve kd and iva under the forward divergence, and not all of {asking}")
        self.student = student
        # Hidden from nn.Module: the teacher has no optimiser state, is not wrapped, and never enters a checkpoint.
        self._teacher = (teacher,)
        self._signals = signals
        self.method = method
        self.measured: dict[str, Tensor | int] = {}  # `Seen.measured`, summed over passes since this process began
        self._shares_weights = sum(p.numel() for p in self.parameters() if p.requires_grad) >= SHARED_FROM
        self.term_modules = nn.ModuleDict()
        for name, term in method.terms.items():
            if method.weighs(name) and isinstance(term, Trained):
                weight = student.head.weight
                made = term.module(weight.shape[1], None if teacher is None else teacher.head.weight.shape[1])
                self.term_modules[name] = made.to(weight.device)

    @staticmethod
    def _kinds(method: Method) -> list[str]:
        own = [getattr(term, "divergence", None) for name, term in method.terms.items() if method.weighs(name)]
        return [(divergence or method.divergence).kind for divergence in own]

    @property
    def teacher(self) -> Teacher:
        assert self.live_teacher is not None
        return self.live_teacher

    @property
    def live_teacher(self) -> Teacher | None:
        """None where a cache serves, or no term needs a teacher."""
        return self._teacher[0]

    def stepped(self, means: Tensor) -> None:
        """Tell the terms' modules that follow their loss what its global mean was, in the order of `Method.terms`."""
        for name, mean in zip(self.method.terms, means.detach(), strict=True):
            if name in self.term_modules and isinstance(module := self.term_modules[name], Follows):
                module.stepped(mean, self.progress)

    def forward(self, batch: Batch, keys: list[int], draws: Tensor | None = None) -> Sums:
        """Sums and counts of the terms with a positive weight.

        Args:
            keys: one integer per sample, the seed of its draws.
            draws: (N, d) from `draw`, where the caller had to count before the backward pass; else drawn here.
        """
        method, terms = self.method, self.method.terms
        seen = self._see(batch, keys, draws)
        ribbon = seen.ribbon
        sums = dict.fromkeys(terms, seen.zero)
        wanted = computed([name for name in terms if method.weighs(name)])
        for name in dict.fromkeys(("sft", "kd", "tpa", *terms)):  # in this order gradients have always been summed
            if name in wanted:
                sums[name] = terms[name].loss(seen) + seen.zero
        for name, value in seen.measured.items():
            self.measured[name] = self.measured.get(name, 0) + value
        return Sums(
            torch.stack(list(sums.values())),
            self._counts(batch, None if ribbon is None else ribbon.counted),
            0 if ribbon is None else int(ribbon.valid.sum()),
            0 if ribbon is None else ribbon.steps_left_out,
        )

    def _see(self, batch: Batch, keys: list[int], draws: Tensor | None) -> Seen:
        """Every pass of the step: student and teacher over the sequence and its views, then both over the ribbon."""
        method, needs, student = self.method, self.method.needs, self.student
        expanded = needs.ribbon and method.route == "expanded"
        features = student.features(batch)
        shared, continues = SharedWeights(), needs.ribbon and self._shares_weights
        ribbon, cache, my_ribbon = None, None, None
        if expanded:
            ribbon = self._plan(self.draw(batch, keys) if draws is None else draws, batch)
        with student.watched(batch, needs.in_student) as in_student:
            if ribbon is not None:
                mine, my_ribbon = self._expanded(batch, features, ribbon)
            else:
                with shared.first if continues else nullcontext():
                    mine, cache = student.plain(batch, features, keep=needs.ribbon)
        T = batch.input_ids.shape[1]
        in_student.hidden = {layer: states[:, :T] for layer, states in in_student.hidden.items()}
        seen = Seen(
            batch,
            mine,
            student.head,
            keys,
            in_student=in_student,
            divergence_of_arm=method.divergence,
            shared_vocabulary=method.shared_vocabulary,
            chunk_mib=method.chunk_mib,
            progress=self.progress,
            modules=dict(self.term_modules.items()),
        )
        their_cache = None
        if needs.teacher and self._signals is not None:
            seen.teacher, seen.attention = self._signals.look_up(batch, visual=needs.visual, look=needs.attention)
        elif needs.teacher:
            seen.teacher_head = self.teacher.head
            with torch.no_grad():
                of_teacher = self.teacher.features(batch, features)
                with self.teacher.watched(batch, needs.in_teacher) as seen.in_teacher:
                    seen.teacher, their_cache, seen.attention = self.teacher.plain(
                        batch, of_teacher, keep=needs.ribbon, look=needs.attention
                    )
        for view in needs.views:
            seen.views[view.name] = self._viewed(view.edit(batch), view.student, view.teacher)
        if needs.edits and (edits := edits_of(batch)) is not None:
            seen.edited = student.edited(edits)
        if not needs.ribbon:
            return seen
        if ribbon is None:
            if draws is None:
                head, states = (student.head, mine) if method.source == "student" else (self.teacher.head, seen.teacher)
                assert isinstance(states, Tensor)  # no cache serves a ribbon
                draws = self._draw_from(head, states, batch, keys)
            ribbon = self._plan(draws, batch)
            with shared.second if continues else nullcontext():
                my_ribbon = self._continued(student, cache, ribbon, batch)
        seen.ribbon, seen.student_ribbon = ribbon, my_ribbon
        with torch.no_grad():
            seen.teacher_ribbon = self._continued(self.teacher, their_cache, ribbon, batch)
        return seen

    def _viewed(self, batch: Batch, by_student: bool, by_teacher: bool) -> tuple[Tensor | None, Tensor | None]:
        """Hidden states (B, T, d) of an edited batch: the student's, and the teacher's, without a gradient."""
        mine = self.student.plain(batch, self.student.features(batch), keep=False)[0] if by_student else None
        if not by_teacher:
            return mine, None
        with torch.no_grad():
            return mine, self.teacher.plain(batch, self.teacher.features(batch, None), keep=False, look=False)[0]

    def _plan(self, draws: Tensor, batch: Batch) -> Ribbon:
        return plan(draws, batch.input_ids, batch.response, self.method.eos)

    @staticmethod
    def _continued(model: Student | Teacher, cache: Any, ribbon: Ribbon, batch: Batch) -> Tensor:
        """(M, d) hidden states of the ribbon's rows over the cache of the plain pass."""
        mask = continuation_mask(ribbon, batch.attention_mask)
        return model.continued(cache, ribbon.tokens, ribbon.positions, mask)[ribbon.valid]

    @torch.no_grad()
    def draw(self, batch: Batch, keys: list[int]) -> Tensor:
        """(N, d) alternatives in a pass of its own, for when they have to be known before the pass with gradients."""
        if self.method.source == "student":
            hidden, _ = self.student.plain(batch, self.student.features(batch), keep=False)
            return self._draw_from(self.student.head, hidden, batch, keys)
        hidden, _, _ = self.teacher.plain(batch, self.teacher.features(batch, None), keep=False, look=False)
        return self._draw_from(self.teacher.head, hidden, batch, keys)

    def count(self, batch: Batch, draws: Tensor | None) -> Tensor:
        """The units of each term in this batch, given its draws, in the order of `Method.terms`."""
        return self._counts(batch, None if draws is None else counted(draws, self.method.eos))

    @torch.no_grad()
    def _draw_from(self, head: Head, hidden: Tensor, batch: Batch, keys: list[int]) -> Tensor:
        """(N, d) draws from the head's distributions at the rows of `hidden` (B, T, d) that predict the response."""
        method = self.method
        if method.source == "gold":
            return batch.input_ids[:, 1:][batch.response[:, 1:]][:, None]
        response = batch.response[:, 1:]
        rows = hidden[predicting(batch.response)].detach()
        uniform = uniforms(response, keys, method.draws)
        size = rows_per_chunk(len(head.weight), method.chunk_mib)
        drawn = [
            draw(
                probabilities(head(some)[:, : method.shared_vocabulary], method.draw_temperature, method.top_k, method.top_p),
                numbers,
                method.replacement,
            )
            for some, numbers in zip(rows.split(size), uniform.split(size), strict=True)
        ]
        draws = torch.cat(drawn)
        if method.alternatives == "shuffled":
            draws = shuffled(draws, response, keys)
        if method.alternatives == "wrong":  # EOS counts for nothing
            draws = draws.masked_fill(draws == batch.input_ids[:, 1:][response][:, None], method.eos)
        if method.max_expanded_length is None:
            return draws
        whole = (batch.input_ids, batch.attention_mask, batch.response)
        return fit(draws, places(response, keys), *whole, method.eos, method.max_expanded_length)

    def _expanded(self, batch: Batch, features: Any, ribbon: Ribbon) -> tuple[Tensor, Tensor]:
        """(B, T, d) and (M, d) hidden states of one pass over the sequence with the ribbon appended."""
        T = batch.input_ids.shape[1]
        mask = expanded_mask(ribbon, batch.attention_mask)
        hidden = self.student.expanded(batch, features, ribbon.tokens, ribbon.positions, mask)
        return hidden[:, :T], hidden[:, T:][ribbon.valid]

    def _counts(self, batch: Batch, counted_draws: Tensor | None) -> Tensor:
        return torch.stack([term.units(batch, counted_draws) for term in self.method.terms.values()])
