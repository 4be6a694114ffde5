"""One distillation step: the passes through student and teacher, and the sums and counts of the four terms.

Route "continuation": each model runs once over the plain sequence; the ribbon's rows then continue over that pass's
key/value cache, gradients flowing through it, so that the pass which says what to draw is not an extra one. Route
"expanded", for where a cache cannot be kept (gradient checkpointing): the student draws in a pass without gradients, then
runs once over the sequence with the ribbon appended. Both give the same numbers (tests/align_ti/test_step.py).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from components.align_ti import losses
from components.align_ti.batch import Batch
from components.align_ti.divergence import row_divergence
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
    predicting,
    probabilities,
    uniforms,
)
from components.align_ti.shared_weights import SharedWeights
from components.align_ti.top_k import Known, TopK, top_k_row_divergence
from components.align_ti.visual_weights import uniform_attention, visual_weights

SHARED_FROM = 10_000_000  # trained parameters: below, working out whole gradients twice is cheaper than keeping book of rows


class Student(Protocol):
    """A vision-language model seen as the method sees it. d is its width; hidden states are those before the head."""

    def features(self, batch: Batch) -> Any: ...
    def plain(self, batch: Batch, features: Any, keep: bool) -> tuple[Tensor, Any]: ...
    def continued(self, cache: Any, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor: ...
    def expanded(self, batch: Batch, features: Any, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor: ...
    @property
    def head(self) -> Head: ...


class Teacher(Protocol):
    """The frozen teacher. `features` may be given the student's, when both have the same vision tower."""

    def features(self, batch: Batch, of_student: Any) -> Any: ...
    def plain(self, batch: Batch, features: Any, keep: bool, look: bool) -> tuple[Tensor, Any, Tensor | None]: ...
    def continued(self, cache: Any, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor: ...
    @property
    def head(self) -> Head: ...


class Signals(Protocol):
    """What the frozen teacher says of every sample, kept from an earlier pass: it needs no teacher here."""

    def look_up(self, batch: Batch, visual: bool, look: bool) -> tuple[Known, Tensor | None]: ...


@dataclass(frozen=True)
class Method:
    """What to compute; the fields are those of params/distill.yaml and of an arm of params/study.yaml."""

    weights: dict[str, float]  # of each of losses.TERMS; a term of weight 0 is not computed
    kind: str = "forward"
    mix: float = 0.5
    temperature: float = 1.0
    chunk_mib: float = CHUNK_MIB  # of float32 logits that are held at a time, of one model
    uniform: bool = False  # IVA weights: equal instead of the teacher's attention
    draws: int = 4
    source: str = "student"  # of the alternatives: student | teacher | gold
    replacement: bool = True
    draw_temperature: float = 1.0
    top_k: int | None = None  # draw among so many of the most likely tokens
    top_p: float | None = None  # and among the fewest whose probabilities reach this
    max_expanded_length: int | None = None  # tokens of one sample with its alternatives; response steps beyond are left out
    eos: int = 0
    shared_vocabulary: int | None = None  # columns that both heads share; None: those of the narrower one
    route: str = "continuation"  # continuation | expanded

    def wants(self, *terms: str) -> bool:
        return any(self.weights[term] > 0 for term in terms)


@dataclass(frozen=True)
class Terms:
    """(4,) sums and counts in the order of losses.TERMS, how many ribbon rows it took, and how many response steps a cap
    on the length left without alternatives."""

    sums: Tensor
    counts: Tensor
    ribbon_rows: int
    steps_left_out: int


@dataclass(frozen=True)
class _Passes:
    """Hidden states: of the sequence (B, T, d), student's and teacher's, and of the ribbon's M rows (M, d). Empty if unused."""

    mine: Tensor
    theirs: Tensor | Known
    attention: Tensor | None  # (B, Nv), the teacher's
    ribbon: Ribbon | None
    my_ribbon: Tensor
    their_ribbon: Tensor


class AlignTI(nn.Module):
    """The student with the method around it: the module to wrap in DDP or FSDP, whose parameters are the student's alone."""

    def __init__(self, student: Student, teacher: Teacher | None, method: Method, signals: Signals | None = None) -> None:
        """`signals` take the teacher's place for L_kd and L_iva under the forward divergence."""
        super().__init__()
        if teacher is None and signals is None and method.wants("kd", "iva", "tpa"):
            raise ValueError("kd, iva and tpa need a teacher")
        if signals is not None and (method.wants("tpa") or method.kind != "forward"):
            raise ValueError("kept signals serve kd and iva under the forward divergence, and nothing else")
        self.student = student
        # Hidden from nn.Module: the teacher has no optimiser state, is not wrapped, and never enters a checkpoint.
        self._teacher = (teacher,)
        self._signals = signals
        self.method = method
        self._shares_weights = sum(p.numel() for p in self.parameters() if p.requires_grad) >= SHARED_FROM

    @property
    def teacher(self) -> Teacher:
        teacher = self._teacher[0]
        assert teacher is not None
        return teacher

    def forward(self, batch: Batch, keys: list[int], draws: Tensor | None = None) -> Terms:
        """Sums and counts of the terms with a positive weight.

        Args:
            keys: one integer per sample, the seed of its draws.
            draws: (N, d) from `draw`, where the caller had to count before the backward pass; else drawn here.
        """
        method = self.method
        passes = self._passes(batch, keys, draws)
        ribbon = passes.ribbon
        # A batch without units still has a graph to go back through.
        zero = passes.mine.sum(dtype=torch.promote_types(passes.mine.dtype, torch.float32)) * 0.0
        sums = dict.fromkeys(losses.TERMS, zero)
        predicts = predicting(batch.response)
        if method.wants("sft"):
            targets = batch.input_ids[:, 1:][batch.response[:, 1:]]
            sums["sft"] = losses.sft(passes.mine[predicts], self.student.head, targets, method.chunk_mib) + zero
        if method.wants("kd", "tpa"):
            rows = predicts if ribbon is None else predicts | (ribbon.gold > 0)
            text = self._divergence(_at(passes.theirs, rows), passes.mine[rows])
            sums["kd"] = losses.kd(text, predicts[rows]) + zero
            if ribbon is not None:
                after = self._divergence(passes.their_ribbon, passes.my_ribbon)
                sums["tpa"] = losses.tpa(text, ribbon.gold[rows], after, ribbon.multiplicity[ribbon.valid]) + zero
        if method.wants("iva") and bool(batch.visual.any()):
            attention = uniform_attention(batch.visual) if passes.attention is None else passes.attention
            weights = visual_weights(attention, batch.visual)
            sums["iva"] = self._divergence(_at(passes.theirs, batch.visual), passes.mine[batch.visual], weights) + zero
        return Terms(
            torch.stack([sums[term] for term in losses.TERMS]),
            self._counts(batch, None if ribbon is None else ribbon.counted),
            0 if ribbon is None else int(ribbon.valid.sum()),
            0 if ribbon is None else ribbon.steps_left_out,
        )

    def _passes(self, batch: Batch, keys: list[int], draws: Tensor | None) -> _Passes:
        """Every pass of the step: student and teacher over the sequence, then both over the ribbon."""
        method = self.method
        aligned, tpa = method.wants("kd", "iva", "tpa"), method.wants("tpa")
        expanded = tpa and method.route == "expanded"
        features = self.student.features(batch)
        nothing = batch.input_ids.new_zeros(0)
        shared, continues = SharedWeights(), tpa and self._shares_weights
        theirs, their_cache, attention, known, cache, ribbon = nothing, None, None, None, None, None
        if expanded:
            ribbon = self._plan(self.draw(batch, keys) if draws is None else draws, batch)
            mine, my_ribbon = self._expanded(batch, features, ribbon)
        else:
            with shared.first if continues else nullcontext():
                mine, cache = self.student.plain(batch, features, keep=tpa)
        look = method.wants("iva") and not method.uniform
        if aligned and self._signals is not None:
            known, attention = self._signals.look_up(batch, visual=method.wants("iva"), look=look)
        elif aligned:
            with torch.no_grad():
                seen = self.teacher.features(batch, features)
                theirs, their_cache, attention = self.teacher.plain(batch, seen, keep=tpa, look=look)
        if not tpa:
            return _Passes(mine, theirs if known is None else known, attention, None, nothing, nothing)
        if ribbon is None:
            if draws is None:
                from_student = method.source == "student"
                drawn_from = (self.student.head, mine) if from_student else (self.teacher.head, theirs)
                draws = self._draw_from(*drawn_from, batch, keys)
            ribbon = self._plan(draws, batch)
            with shared.second if continues else nullcontext():
                my_ribbon = self._continued(self.student, cache, ribbon, batch)
        with torch.no_grad():
            their_ribbon = self._continued(self.teacher, their_cache, ribbon, batch)
        return _Passes(mine, theirs, attention, ribbon, my_ribbon, their_ribbon)

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
        """(4,) the units of each term in this batch, given its draws."""
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

    def _divergence(self, teacher_rows: Tensor | TopK, student_rows: Tensor, weights: Tensor | None = None) -> Tensor:
        method = self.method
        if isinstance(teacher_rows, TopK):
            return top_k_row_divergence(
                teacher_rows,
                student_rows,
                self.student.head,
                shared=method.shared_vocabulary,
                temperature=method.temperature,
                weights=weights,
                chunk_mib=method.chunk_mib,
            )
        return row_divergence(
            teacher_rows,
            self.teacher.head,
            student_rows,
            self.student.head,
            kind=method.kind,
            mix=method.mix,
            temperature=method.temperature,
            shared=method.shared_vocabulary,
            weights=weights,
            chunk_mib=method.chunk_mib,
        )

    def _counts(self, batch: Batch, counted_draws: Tensor | None) -> Tensor:
        responses = batch.response[:, 1:].sum().float()
        images = batch.visual.any(1).sum().float()
        return torch.stack([responses, responses, images, responses.new_zeros(()) if counted_draws is None else counted_draws])


def _at(theirs: Tensor | Known, rows: Tensor) -> Tensor | TopK:
    """The teacher at the rows of a (B, T) bool mask: hidden states, or the kept word."""
    return theirs.at(rows) if isinstance(theirs, Known) else theirs[rows]
