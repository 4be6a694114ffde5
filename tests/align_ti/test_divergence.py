"""The divergence driver against plain formulas, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.align_ti.divergence import divergence, row_divergence
from components.align_ti.head import Head, cross_entropy, rows_per_chunk

KINDS = ["forward", "reverse", "jsd", "skewed", "skewed_reverse"]


def logits(seed: int, rows: int = 6, columns: int = 11, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def reference(t: torch.Tensor, s: torch.Tensor, kind: str, mix: float, temperature: float) -> torch.Tensor:
    """By the definitions, in probabilities."""
    p, q = torch.softmax(t / temperature, -1), torch.softmax(s / temperature, -1)

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * torch.log(a / b)).sum(-1)

    m = mix * p + (1 - mix) * q
    return {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "jsd": mix * kl(p, m) + (1 - mix) * kl(q, m),
        "skewed": kl(p, m),
        "skewed_reverse": kl(q, mix * q + (1 - mix) * p),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), mix=st.floats(0.05, 0.95), temperature=st.floats(0.5, 4.0))
@settings(max_examples=25)
def test_equals_the_definition(kind: str, seed: int, mix: float, temperature: float) -> None:
    t, s = logits(seed), logits(seed + 1).requires_grad_()
    got, expected = divergence(t, s, kind, mix, temperature), reference(t, s, kind, mix, temperature)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), s), torch.autograd.grad(expected.sum(), s), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_finite_differences(kind: str) -> None:
    t = logits(1)
    assert torch.autograd.gradcheck(lambda s: divergence(t, s, kind, 0.3, 1.5), logits(2).requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_zero_only_for_equal_distributions(kind: str) -> None:
    t = logits(3)
    exact = kind in ("forward", "reverse")  # the others round once, in the mixture
    assert divergence(t, t.clone(), kind).abs().max() <= (0 if exact else 1e-15)
    assert divergence(t, logits(4), kind).min() > 1e-3


def test_heads_of_different_width_are_cut_before_the_softmax() -> None:
    t, s = logits(5, columns=11), logits(6, columns=9)
    torch.testing.assert_close(divergence(t, s), divergence(t[:, :9], s))
    assert not torch.allclose(
        divergence(t[:, :9], s), (t.softmax(-1)[:, :9] * (t.log_softmax(-1)[:, :9] - s.log_softmax(-1))).sum(-1)
    )


@pytest.mark.parametrize(("mix", "kind"), [(0.0, "forward"), (1.0, "reverse")])
def test_jsd_at_its_ends_is_forward_and_reverse_kl(mix: float, kind: str) -> None:
    t, s = logits(3), logits(4)
    torch.testing.assert_close(divergence(t, s, "jsd", mix), divergence(t, s, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_vocabulary_entries_add_nothing(kind: str) -> None:
    t, s = logits(7), logits(8)
    t[:, 3] = s[:, 3] = -math.inf
    s.requires_grad_()
    keep = [c for c in range(11) if c != 3]
    value = divergence(t, s, kind)
    torch.testing.assert_close(value, divergence(t[:, keep], s[:, keep], kind))
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert gradient.isfinite().all()


D_T, D_S, V_T, V_S, ROWS = 5, 3, 12, 10, 13


def mib(rows: int, columns: int = V_T) -> float:
    """The budget that makes chunks of so many rows."""
    return rows * columns * 4 / 2**20


def heads(
    dtype: torch.dtype, bias: bool = False, cap: float | None = None
) -> tuple[torch.Tensor, Head, torch.Tensor, Head, list[torch.Tensor]]:
    """Teacher's rows and head, student's, and the tensors of the student that are trained."""
    stream = torch.Generator().manual_seed(9)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=stream, dtype=torch.float64).to(dtype)

    teacher, rows = drawn(ROWS, D_T), drawn(ROWS, D_S).requires_grad_()
    frozen = Head(drawn(V_T, D_T), drawn(V_T) if bias else None, cap)
    student = Head(drawn(V_S, D_S).requires_grad_(), drawn(V_S).requires_grad_() if bias else None, cap)
    return teacher, frozen, rows, student, [x for x in (rows, student.weight, student.bias) if x is not None]


def plain_logits(rows: torch.Tensor, head: Head) -> torch.Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    logits = rows.to(wide) @ head.weight.to(wide).T + (0 if head.bias is None else head.bias.to(wide))
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def same(got: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    """bf16 operands: all is computed in float32, and the gradients rounded once, to bf16, at the end."""
    for value, target in zip(got, expected, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(value, target, rtol=1e-11, atol=1e-12)
        else:
            torch.testing.assert_close(value, target, rtol=2**-7 if value.dtype == dtype else 1e-5, atol=1e-4)


WEIGHTS = torch.arange(1.0, ROWS + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 4, 13])
@pytest.mark.parametrize(
    ("kind", "bias", "cap", "temperature"),
    [("forward", False, None, 1.0), ("reverse", True, None, 2.0), ("jsd", False, 2.5, 1.0), ("skewed", True, 2.5, 0.7)],
)
def test_chunks_equal_full_logits_in_values_and_gradients(
    dtype: torch.dtype, chunk: int, kind: str, bias: bool, cap: float | None, temperature: float
) -> None:
    teacher, frozen, rows, head, trained = heads(dtype, bias, cap)
    options = {"kind": kind, "mix": 0.3, "temperature": temperature}
    got = row_divergence(teacher, frozen, rows, head, chunk_mib=mib(chunk), **options)
    expected = divergence(plain_logits(teacher, frozen), plain_logits(rows, head), *options.values())
    same([got], [expected], dtype)
    gradients = [torch.autograd.grad((x * WEIGHTS).sum(), trained) for x in (got, expected)]
    same(*map(list, gradients), dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU multiplies 16-bit operands and sums in float32")
@pytest.mark.parametrize("bias", [False, True])
def test_16_bit_rows_and_head_on_a_gpu_give_the_logits_of_operands_that_were_cast(bias: bool) -> None:
    _, frozen, *_ = heads(torch.bfloat16, bias)
    rows = torch.randn(ROWS, D_T, device="cuda").bfloat16()
    head = Head(frozen.weight.cuda(), None if frozen.bias is None else frozen.bias.cuda(), frozen.cap)
    with torch.no_grad():
        got = head(rows)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), plain_logits(rows.double(), head).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 4, 13])
@pytest.mark.parametrize(("kind", "bias", "cap"), [("forward", False, None), ("jsd", True, 2.5)])
@pytest.mark.parametrize("frozen_part", [None, "head", "rows"])
def test_a_weighted_sum_is_that_of_the_rows_in_values_and_gradients(
    dtype: torch.dtype, chunk: int, kind: str, bias: bool, cap: float | None, frozen_part: str | None
) -> None:
    teacher, frozen, rows, head, trained = heads(dtype, bias, cap)
    if frozen_part:
        gone = (rows,) if frozen_part == "rows" else (head.weight, head.bias)
        trained = [x for x in trained if all(x is not y for y in gone)]
        for x in gone:
            if x is not None:
                x.requires_grad_(False)
    weights = WEIGHTS.clone().requires_grad_()
    got = row_divergence(teacher, frozen, rows, head, kind=kind, weights=weights, chunk_mib=mib(chunk))
    expected = (WEIGHTS * divergence(plain_logits(teacher, frozen), plain_logits(rows, head), kind)).sum()
    same([got], [expected], dtype)
    same(*(list(torch.autograd.grad(x * 0.3, trained)) for x in (got, expected)), dtype)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(got, [*trained, weights], allow_unused=True)
    with torch.no_grad():
        again = row_divergence(teacher, frozen, rows, head, kind=kind, weights=weights, chunk_mib=mib(chunk))
    same([again], [expected], dtype)
    assert not again.requires_grad


def test_no_gradient_reaches_the_weights() -> None:
    teacher, frozen, rows, head, _ = heads(torch.float64)
    weights = torch.rand(ROWS, requires_grad=True)
    for chunk in (4, ROWS):
        row_divergence(teacher, frozen, rows, head, weights=weights, chunk_mib=mib(chunk)).backward()
    assert weights.grad is None and rows.grad is not None


@pytest.mark.parametrize("frozen_part", ["head", "rows"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen_part: str) -> None:
    teacher, frozen, rows, head, _ = heads(torch.float64)
    left = (rows, head.weight)[frozen_part == "rows"]
    (head.weight if frozen_part == "head" else rows).requires_grad_(False)
    got, expected = (row_divergence(teacher, frozen, rows, head, chunk_mib=mib(size)) for size in (4, ROWS))
    same([*torch.autograd.grad(got.sum(), left)], [*torch.autograd.grad(expected.sum(), left)], torch.float64)
    rows.requires_grad_(False), head.weight.requires_grad_(False)
    assert not row_divergence(teacher, frozen, rows, head, chunk_mib=mib(4)).requires_grad


def test_a_tied_head_sums_what_it_gets_as_head_and_as_embedding() -> None:
    teacher, frozen, _, head, _ = heads(torch.float64)
    tokens = torch.arange(ROWS) % V_S

    def gradient(size: int) -> torch.Tensor:
        rows = torch.nn.functional.embedding(tokens, head.weight).tanh()
        return torch.autograd.grad(row_divergence(teacher, frozen, rows, head, chunk_mib=mib(size)).sum(), head.weight)[0]

    same([gradient(3)], [gradient(ROWS)], torch.float64)


def test_a_wide_16_bit_head_is_widened_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, frozen, rows, head, trained = heads(torch.bfloat16)
    plain = torch.autograd.grad(row_divergence(teacher, frozen, rows, head, chunk_mib=mib(4)).sum(), trained)
    monkeypatch.setattr("components.align_ti.head.COLUMNS_AT_ONCE", 5)
    sliced = torch.autograd.grad(row_divergence(teacher, frozen, rows, head, chunk_mib=mib(4)).sum(), trained)
    same(list(sliced), list(plain), torch.bfloat16)


def test_autocast_does_not_narrow_the_chunks() -> None:
    teacher, frozen, rows, head, trained = heads(torch.float32)
    expected = row_divergence(teacher, frozen, rows, head)
    with torch.autocast("cpu", torch.bfloat16):
        got = row_divergence(teacher, frozen, rows, head, chunk_mib=mib(4))
        gradients = torch.autograd.grad(got.sum(), trained)
    same([got, *gradients], [expected, *torch.autograd.grad(expected.sum(), trained)], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 4, 13])
@pytest.mark.parametrize(("bias", "cap"), [(False, None), (True, None), (True, 2.5)])
def test_cross_entropy_equals_full_logits(dtype: torch.dtype, chunk: int, bias: bool, cap: float | None) -> None:
    _, _, rows, head, trained = heads(dtype, bias, cap)
    targets = torch.arange(ROWS) % V_S
    got = cross_entropy(rows, head, targets, mib(chunk, V_S))
    expected = torch.nn.functional.cross_entropy(plain_logits(rows, head), targets, reduction="sum")
    same([got], [expected], dtype)
    same(*(list(torch.autograd.grad(x * 0.3, trained)) for x in (got, expected)), dtype)


@given(columns=st.integers(1, 200_000), budget=st.floats(0.001, 1000))
@settings(max_examples=50)
def test_chunks_are_sized_from_the_vocabulary(columns: int, budget: float) -> None:
    rows = rows_per_chunk(columns, budget)
    assert rows >= 1
    assert rows * columns * 4 <= budget * 2**20 or rows == 1
    assert (rows + 1) * columns * 4 > budget * 2**20


@pytest.mark.parametrize("loss", ["divergence", "cross_entropy", "capped cross_entropy"])
def test_chunks_keep_no_logits_for_the_backward_pass(loss: str) -> None:
    """What autograd saves must not grow with rows x vocabulary."""
    rows, vocabulary, d = 64, 5_000, 4
    head = Head(torch.randn(vocabulary, d, requires_grad=True), cap=30.0 if loss.startswith("capped") else None)
    hidden = torch.randn(rows, d, requires_grad=True)
    targets = torch.arange(rows)

    def saved_elements(chunk_rows: int) -> int:
        sizes: list[int] = []
        budget = mib(chunk_rows, vocabulary)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            if loss == "divergence":
                row_divergence(hidden.detach(), head, hidden, head, chunk_mib=budget)
            else:
                cross_entropy(hidden, head, targets, budget)
        return sum(sizes)

    assert saved_elements(1000) > rows * vocabulary
    assert saved_elements(8) <= vocabulary * d + rows * d + rows < rows * vocabulary / 10


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        divergence(logits(1), logits(2), "kl")


def test_columns_beyond_the_shared_ones_do_not_count() -> None:
    teacher, student = Head(torch.randn(9, 3)), Head(torch.randn(11, 3))
    rows = torch.randn(4, 3)
    got = row_divergence(rows, teacher, rows, student, shared=6)
    expected = row_divergence(rows, Head(teacher.weight[:6]), rows, Head(student.weight[:6]))
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, row_divergence(rows, teacher, rows, student))
