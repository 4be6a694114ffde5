"""The kept word against the whole distribution: a bound always, the same thing where all of it is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.align_ti.batch import predicting
from components.align_ti.cached import Cached, cached_row_divergence
from components.align_ti.divergence import divergence
from components.align_ti.head import Head
from components.align_ti.step import AlignTI, Method
from components.align_ti.terms import CORE
from components.align_ti.top_k import TopK, decoupled, top_k
from components.distill.teacher import FrozenTeacher
from components.models.vlm import VLM
from tests import tiny
from tests.align_ti.test_divergence import logits

ROWS, V = 6, 11


@given(seed=st.integers(0, 10_000), k=st.integers(1, V), scale=st.floats(0.1, 30.0), temperature=st.floats(0.5, 4.0))
@settings(max_examples=60)
def test_never_more_than_the_exact_divergence_and_grows_with_k(seed: int, k: int, scale: float, temperature: float) -> None:
    t, s = logits(seed, scale=scale), logits(seed + 1, scale=scale)
    exact = divergence(t, s, temperature=temperature)
    coarser, finer = (top_k(t, n, temperature).divergence(s, temperature) for n in (k, k + 1))
    slack = 1e-12 * (1 + exact)
    assert (coarser >= -slack).all() and (coarser <= finer + slack).all() and (finer <= exact + slack).all()


@given(seed=st.integers(0, 10_000), k=st.integers(1, V - 1), scale=st.floats(0.1, 30.0))
@settings(max_examples=25)
def test_taken_apart_it_adds_up_to_the_divergence(seed: int, k: int, scale: float) -> None:
    t, s = logits(seed, scale=scale), logits(seed + 1, scale=scale)
    of_tokens, among_others, mass = decoupled(t, s, t.topk(k).indices)
    torch.testing.assert_close(of_tokens + mass * among_others, divergence(t, s), rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 10_000), temperature=st.floats(0.5, 4.0))
@settings(max_examples=25)
def test_all_tokens_kept_is_the_exact_divergence_gradients_too(seed: int, temperature: float) -> None:
    t, s = logits(seed), logits(seed + 1).requires_grad_()
    got = top_k(t, V + 5, temperature).divergence(s, temperature)
    expected = divergence(t, s, temperature=temperature)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), s), torch.autograd.grad(expected.sum(), s), rtol=1e-9, atol=1e-12)


def test_equals_the_definition_with_the_tail_as_one_outcome() -> None:
    t, s = logits(1), logits(2)
    top = top_k(t, 3)
    p, q = t.softmax(-1), s.softmax(-1)
    outcomes = [torch.cat([x.gather(1, top.tokens), 1 - x.gather(1, top.tokens).sum(1, keepdim=True)], 1) for x in (p, q)]
    expected = (outcomes[0] * (outcomes[0] / outcomes[1]).log()).sum(1)
    torch.testing.assert_close(top.divergence(s), expected, rtol=1e-10, atol=1e-12)


def test_gradient_by_finite_differences() -> None:
    top = top_k(logits(3), 4, 1.5)
    assert torch.autograd.gradcheck(lambda s: top.divergence(s, 1.5), logits(4).requires_grad_())


def test_a_tail_below_what_float32_can_subtract_is_kept() -> None:
    sharp = torch.tensor([[0.0, -40.0, -41.0, -42.0]])
    top = top_k(sharp, 2)
    assert top.log_tail.item() == pytest.approx(torch.tensor([-41.0, -42.0]).logsumexp(0).item(), abs=1e-4)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_neither_value_nor_gradient(chunk: int) -> None:
    rows, head = torch.randn(ROWS, 3, dtype=torch.float64), torch.randn(V + 2, 3, dtype=torch.float64)
    rows.requires_grad_(), head.requires_grad_()
    top = top_k(logits(5), 4)

    def run(size: int) -> tuple[torch.Tensor, ...]:
        value = cached_row_divergence(top, rows, Head(head), shared=V, chunk_mib=4 * (V + 2) * size / 2**20)
        return value, *torch.autograd.grad((value * torch.arange(ROWS)).sum(), (rows, head))

    for got, expected in zip(run(chunk), run(1000), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(run(chunk)[0], top.divergence((rows @ head.T)[:, :V]))


class ComputedSignals:
    """Signals of one batch, computed from the teacher itself."""

    def __init__(self, teacher: FrozenTeacher, k: int) -> None:
        self.teacher, self.k = teacher, k

    @torch.no_grad()
    def look_up(self, batch, visual: bool, with_attention: bool) -> tuple[Cached, torch.Tensor | None]:
        hidden, _, attention = self.teacher.plain(batch, self.teacher.features(batch, None), False, with_attention)
        where = predicting(batch.response) | (batch.visual if visual else False)
        index = torch.full(batch.input_ids.shape, -1)
        index[where] = torch.arange(int(where.sum()))
        return Cached(top_k(self.teacher.head(hidden[where]), self.k), index), attention


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("samples", [[(1, 3, 3), (0, 2, 2), (1, 5, 2), (1, 1, 1)], [(1, 0, 2), (1, 4, 6)], [(0, 2, 3)]])
def test_a_step_from_kept_signals_is_the_step_with_the_teacher(samples: list[tuple[int, int, int]], uniform: bool) -> None:
    student = VLM(tiny.llava("qwen2", 1).double())
    teacher = FrozenTeacher(VLM(tiny.llava("qwen2", 2, hidden=48, layers=3).double()), 1, False)
    batch = tiny.batch(samples, dtype=torch.float64)
    weights = {"sft": 1.0, "kd": 0.7, "iva": 1.3, "tpa": 0.0}
    method = Method(weights, options={"iva": {"uniform": uniform}}, eos=tiny.EOS, shared_vocabulary=tiny.VOCABULARY)
    results = []
    for module in (
        AlignTI(student, teacher, method),
        AlignTI(student, None, method, ComputedSignals(teacher, tiny.VOCABULARY)),
        AlignTI(student, None, method, ComputedSignals(teacher, 3)),
    ):
        terms = module(batch, list(range(len(samples))))
        student.zero_grad()
        (torch.tensor([weights[t] for t in CORE]) * terms.sums).sum().backward()
        results.append((terms.sums.detach(), [p.grad.clone() for p in student.parameters() if p.grad is not None]))
    (live, live_gradients), (cached, cached_gradients), (cut, _) = results
    torch.testing.assert_close(cached, live, rtol=1e-10, atol=1e-12)
    for got, expected in zip(cached_gradients, live_gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)  # RMSNorm is float32 inside
    assert cut[0] == live[0] and (0 < cut[1] < live[1]) and (cut[2] < live[2] or not live[2])


def test_what_signals_cannot_serve_is_refused() -> None:
    student, signals = VLM(tiny.llava()), ComputedSignals(None, 3)  # type: ignore[arg-type]
    for options in ({"kind": "reverse"}, {"weights": dict.fromkeys(CORE, 1.0)}):
        with pytest.raises(ValueError, match="kd and iva under the forward divergence"):
            AlignTI(student, None, Method(**{"weights": {"sft": 0.0, "kd": 1.0, "iva": 0.0, "tpa": 0.0}, **options}), signals)
    cached = Cached(TopK(torch.zeros(1, 1).long(), torch.zeros(1, 1), torch.zeros(1)), torch.tensor([[0, -1]]))
    with pytest.raises(ValueError, match="no teacher distribution"):
        cached.at(torch.tensor([[True, True]]))
