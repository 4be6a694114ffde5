"""Distillation step: forward passes of student and teacher that the arm's terms need; each term's sum and count.

L = sum over terms of weight x sum / count (docs/method.md, "Total"). A term returns a sum over its own units and their
count, because a mean of means would depend on the split of the batch over devices and accumulation steps.

Route "continuation": each model runs once over the plain sequence; the ribbon's rows then continue over that pass's
key/value cache, with gradients through it, so that sampling alternatives costs no extra pass. Route "expanded", for
gradient checkpointing, which keeps no cache: the student samples in a pass without gradients, then runs once over the
sequence with the ribbon appended. Both give the same numbers (tests/align_ti/test_step.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from components.align_ti.batch import Batch, predicting
from components.align_ti.cached import Cached
from components.align_ti.divergence import Divergence
from components.align_ti.head import CHUNK_MIB, rows_per_chunk
from components.align_ti.interfaces import Signals, Student, Teacher
from components.align_ti.ribbon import (
    Ribbon,
    continuation_mask,
    counted,
    draw,
    draw_distinct,
    expanded_mask,
    fit,
    plan,
    probabilities,
    shuffled,
    step_priorities,
    uniforms,
)
from components.align_ti.shared_weights import SharedWeights
from components.align_ti.step_outputs import StepOutputs
from components.align_ti.terms import CORE, DepthAware, LossAware, Needs, Term, Trained, computed, term_class, union

SHARED_FROM = 10_000_000  # trained parameters from which deferred weight gradients cost less than computing them twice


@dataclass(frozen=True)
class Method:
    """Configuration of the step; the fields are those of params/distill.yaml and of an arm of params/study.yaml."""

    weights: dict[str, float]  # weight of each term by name; absent or 0: not computed (except L_kd beside L_tpa)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # fields of each `Term`, by term name
    kind: str = "forward"  # this and the next two: default divergence, for terms without their own
    mix: float = 0.5
    temperature: float = 1.0
    chunk_mib: float = CHUNK_MIB  # budget of one model's float32 logits per chunk
    draws: int = 4
    source: str = "student"  # distribution of the alternatives: student | teacher | gold
    replacement: bool = True
    draw_temperature: float = 1.0
    top_k: int | None = None  # top-k sampling of alternatives
    top_p: float | None = None  # nucleus sampling, after top-k
    alternatives: str | None = None  # control: shuffled | wrong
    max_expanded_length: int | None = None  # tokens of one sample with its alternatives; response steps beyond are left out
    eos: int = 0
    shared_vocabulary: int | None = None  # columns that both heads share; None: the narrower head's
    route: str = "continuation"  # continuation | expanded
    depths: tuple[int, int] | None = None  # decoder layers of student and teacher, for terms that pick layers by a rule

    @cached_property
    def terms(self) -> dict[str, Term]:
        """Reported terms in order: the core terms, then others with a positive weight."""
        active = (name for name, weight in self.weights.items() if weight > 0)
        return {name: self._term(name) for name in dict.fromkeys((*CORE, *active))}

    def _term(self, name: str) -> Term:
        options = dict(self.options.get(name, {}))
        if isinstance(options.get("divergence"), dict):
            options["divergence"] = Divergence(**options["divergence"])
        term: Term = term_class(name)(**options)
        return term.at_depth(*self.depths) if self.depths and isinstance(term, DepthAware) else term

    @cached_property
    def weighted_terms(self) -> dict[str, Term]:
        """Terms with a positive weight, in the order of `terms`."""
        return {name: term for name, term in self.terms.items() if self.weights.get(name, 0) > 0}

    @property
    def divergence(self) -> Divergence:
        return Divergence(self.kind, self.mix, self.temperature)

    @cached_property
    def needs(self) -> Needs:
        """Union of the needs of all terms with a positive weight."""
        return union(term.needs for term in self.weighted_terms.values())

    def weight_vector(self, device: torch.device | None = None) -> Tensor:
        """Loss weights in the order of `terms`."""
        return torch.tensor([float(self.weights.get(name, 0)) for name in self.terms], device=device)


def total(sums: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
    """Total loss L from sums, global-batch counts and weights, all in the order of `Method.terms`.

    A term without units (no image in the whole batch, every draw EOS) is 0.
    """
    return (weights * sums / counts.clamp_min(1)).sum()


@dataclass(frozen=True)
class Sums:
    """Sums and counts of the terms, in the order of `Method.terms`."""

    sums: Tensor
    counts: Tensor
    ribbon_rows: int = 0
    steps_left_out: int = 0  # response steps that the cap on the length left without alternatives


class AlignTI(nn.Module):
    """Distillation module around the student, to wrap in DDP or FSDP.

    Its parameters are the student's and those of `term_modules`, auxiliary modules of terms that are never exported.
    """

    progress = 0.0  # training progress, set by the loop before each step

    def __init__(self, student: Student, teacher: Teacher | None, method: Method, signals: Signals | None = None) -> None:
        """`signals` replace the teacher if no term needs it live and all divergences are forward KL."""
        super().__init__()
        needs, weighted_terms = method.needs, method.weighted_terms
        teacher_terms = ", ".join(name for name, term in weighted_terms.items() if term.needs.teacher)
        kinds = {(getattr(term, "divergence", None) or method.divergence).kind for term in weighted_terms.values()}
        if teacher is None and signals is None and needs.teacher:
            raise ValueError(f"{teacher_terms} need a teacher")
        if signals is not None and (needs.live_teacher or kinds - {"forward"}):
            raise ValueError(f"kept signals serve kd and iva under the forward divergence, and not all of {teacher_terms}")
        self.student = student
        # A tuple hides the teacher from nn.Module: no optimiser state, no DDP/FSDP wrapping, no entry in checkpoints.
        self._teacher = (teacher,)
        self._signals = signals
        self.method = method
        self.diagnostics: dict[str, Tensor | int] = {}  # `StepOutputs.diagnostics`, summed over passes since process start
        self._teacher_constants: dict[str, Tensor] = {}  # `StepOutputs.teacher_constants`
        self._shares_weights = sum(p.numel() for p in self.parameters() if p.requires_grad) >= SHARED_FROM
        self.term_modules = nn.ModuleDict()
        for name, term in weighted_terms.items():
            if isinstance(term, Trained):
                weight = student.head.weight
                term_module = term.module(weight.shape[1], None if teacher is None else teacher.head.weight.shape[1])
                self.term_modules[name] = term_module.to(weight.device)

    @property
    def teacher(self) -> Teacher:
        assert self.live_teacher is not None
        return self.live_teacher

    @property
    def live_teacher(self) -> Teacher | None:
        """The live teacher; None under cached signals, or if no term needs a teacher."""
        return self._teacher[0]

    def stepped(self, means: Tensor) -> None:
        """Pass each term's global mean, in the order of `Method.terms`, to the term modules that track their loss."""
        for name, mean in zip(self.method.terms, means.detach(), strict=True):
            if name in self.term_modules and isinstance(module := self.term_modules[name], LossAware):
                module.stepped(mean, self.progress)

    def forward(self, batch: Batch, keys: list[int], draws: Tensor | None = None) -> Sums:
        """Sums and counts of all reported terms; the sum of a term that is not computed is 0.

        Args:
            keys: seed of each sample's draws.
            draws: (N, d) from `draw`, if the caller counted units before the backward pass; None: drawn here.
        """
        terms = self.method.terms
        outputs = self._forward_passes(batch, keys, draws)
        sums = dict.fromkeys(terms, outputs.zero)
        active = computed(self.method.weighted_terms)
        for name in dict.fromkeys(("sft", "kd", "tpa", *terms)):  # fixed order of gradient summation, for equal bytes
            if name in active:
                sums[name] = terms[name].loss(outputs) + outputs.zero
        for name, value in outputs.diagnostics.items():
            self.diagnostics[name] = self.diagnostics.get(name, 0) + value
        term_sums, ribbon = torch.stack(list(sums.values())), outputs.ribbon
        if ribbon is None:
            return Sums(term_sums, self._counts(batch, None))
        return Sums(term_sums, self._counts(batch, ribbon.counted), int(ribbon.valid.sum()), ribbon.steps_left_out)

    def _forward_passes(self, batch: Batch, keys: list[int], draws: Tensor | None) -> StepOutputs:
        """All forward passes of the step: student and teacher over the sequence and its views, then both over the ribbon."""
        method, needs, student = self.method, self.method.needs, self.student
        features = student.features(batch)
        shared = SharedWeights(active=needs.ribbon and self._shares_weights)
        ribbon, student_ribbon, cache = None, None, None
        if needs.ribbon and method.route == "expanded":
            ribbon = self._plan(self.draw(batch, keys) if draws is None else draws, batch)
        with student.watched(batch, needs.in_student) as in_student:
            if ribbon is not None:
                student_hidden, student_ribbon = self._expanded(batch, features, ribbon)
            else:
                with shared.first:
                    student_hidden, cache = student.plain(batch, features, keep=needs.ribbon)
        T = batch.input_ids.shape[1]
        in_student.hidden = {layer: states[:, :T] for layer, states in in_student.hidden.items()}
        outputs = StepOutputs(
            batch,
            student_hidden,
            student.head,
            keys,
            in_student=in_student,
            ribbon=ribbon,
            student_ribbon=student_ribbon,
            default_divergence=method.divergence,
            shared_vocabulary=method.shared_vocabulary,
            chunk_mib=method.chunk_mib,
            progress=self.progress,
            teacher_constants=self._teacher_constants,
            modules=dict(self.term_modules.items()),
        )
        teacher_cache = self._teacher_pass(outputs, features) if needs.teacher else None
        for view in needs.views:
            outputs.views[view.name] = self._plain(view.edit(batch), view.student, view.teacher)
        if needs.edits and batch.edits is not None:
            outputs.edited = student.edited(batch.edits)
        if not needs.ribbon:
            return outputs
        if outputs.ribbon is None:
            outputs.ribbon = self._plan(
                self._draw_from(batch, keys, student_hidden, outputs.teacher) if draws is None else draws, batch
            )
            with shared.second:
                outputs.student_ribbon = self._continued(student, cache, outputs.ribbon, batch)
        with torch.no_grad():
            outputs.teacher_ribbon = self._continued(self.teacher, teacher_cache, outputs.ribbon, batch)
        return outputs

    @torch.no_grad()
    def _teacher_pass(self, outputs: StepOutputs, features: Any) -> Any:
        """Add the teacher's outputs for the sequence, live or cached. Returns its key/value cache, None without a ribbon."""
        batch, needs = outputs.batch, self.method.needs
        if self._signals is not None:
            outputs.teacher, outputs.attention = self._signals.look_up(
                batch, visual=needs.visual, with_attention=needs.attention
            )
            return None
        teacher = self.teacher
        outputs.teacher_head = teacher.head
        features = teacher.features(batch, features)
        with teacher.watched(batch, needs.in_teacher) as outputs.in_teacher:
            outputs.teacher, cache, outputs.attention = teacher.plain(
                batch, features, keep=needs.ribbon, with_attention=needs.attention
            )
        return cache

    def _plain(self, batch: Batch, by_student: bool, by_teacher: bool) -> tuple[Tensor | None, Tensor | None]:
        """Student and teacher hidden states (B, T, d) of a batch; the teacher's carry no gradient."""
        student_hidden = self.student.plain(batch, self.student.features(batch), keep=False)[0] if by_student else None
        if not by_teacher:
            return student_hidden, None
        with torch.no_grad():
            return student_hidden, self.teacher.plain(
                batch, self.teacher.features(batch, None), keep=False, with_attention=False
            )[0]

    def _plan(self, draws: Tensor, batch: Batch) -> Ribbon:
        return plan(draws, batch.input_ids, batch.response, self.method.eos)

    @staticmethod
    def _continued(model: Student | Teacher, cache: Any, ribbon: Ribbon, batch: Batch) -> Tensor:
        """(M, d) hidden states of the ribbon's rows over the cache of the plain pass."""
        mask = continuation_mask(ribbon, batch.attention_mask)
        return model.continued(cache, ribbon.tokens, ribbon.positions, mask)[ribbon.valid]

    @torch.no_grad()
    def draw(self, batch: Batch, keys: list[int]) -> Tensor:
        """(N, d) alternatives from a separate pass, for draws that must be known before the pass with gradients."""
        source = self.method.source
        return self._draw_from(batch, keys, *self._plain(batch, source == "student", source == "teacher"))

    def count(self, batch: Batch, draws: Tensor | None) -> Tensor:
        """Number of units per term in this batch, given its draws, in the order of `Method.terms`."""
        return self._counts(batch, None if draws is None else counted(draws, self.method.eos))

    @torch.no_grad()
    def _draw_from(
        self, batch: Batch, keys: list[int], student_hidden: Tensor | None, teacher_hidden: Tensor | Cached | None
    ) -> Tensor:
        """(N, d) draws at the rows that predict the response, from the source's hidden states (B, T, d); source gold: the gold
        tokens (N, 1)."""
        method, response = self.method, batch.response[:, 1:]
        gold = batch.input_ids[:, 1:][response][:, None]
        if method.source == "gold":
            return gold
        head, hidden = (
            (self.student.head, student_hidden) if method.source == "student" else (self.teacher.head, teacher_hidden)
        )
        assert isinstance(hidden, Tensor)  # no cache serves a ribbon
        rows = hidden[predicting(batch.response)].detach()
        uniform = uniforms(response, keys, method.draws)
        size = rows_per_chunk(len(head.weight), method.chunk_mib)

        def draw_chunk(chunk: Tensor, chunk_uniforms: Tensor) -> Tensor:
            logits = head(chunk)[:, : method.shared_vocabulary]
            if not method.replacement:
                return draw_distinct(logits, chunk_uniforms, method.draw_temperature, method.top_k)
            return draw(probabilities(logits, method.draw_temperature, method.top_k, method.top_p), chunk_uniforms)

        draws = torch.cat(list(map(draw_chunk, rows.split(size), uniform.split(size))))
        if method.alternatives == "shuffled":
            draws = shuffled(draws, response, keys)
        if method.alternatives == "wrong":  # gold draws become EOS, which does not count
            draws = draws.masked_fill(draws == gold, method.eos)
        if method.max_expanded_length is None:
            return draws
        sequence = (batch.input_ids, batch.attention_mask, batch.response)
        return fit(draws, step_priorities(response, keys), *sequence, method.eos, method.max_expanded_length)

    def _expanded(self, batch: Batch, features: Any, ribbon: Ribbon) -> tuple[Tensor, Tensor]:
        """(B, T, d) and (M, d) hidden states of one pass over the sequence with the ribbon appended."""
        T = batch.input_ids.shape[1]
        mask = expanded_mask(ribbon, batch.attention_mask)
        hidden = self.student.expanded(batch, features, ribbon.tokens, ribbon.positions, mask)
        return hidden[:, :T], hidden[:, T:][ribbon.valid]

    def _counts(self, batch: Batch, counted_draws: Tensor | None) -> Tensor:
        return torch.stack([term.units(batch, counted_draws) for term in self.method.terms.values()])
