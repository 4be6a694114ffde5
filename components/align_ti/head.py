"""Output head, and per-row losses of its logits, computed in chunks of rows.

Float32 logits take rows x vocabulary x 4 bytes: 443 MB for an image of 729 tokens at V = 151,936, and a loss holds several.
Chunks bound that: their logits are recomputed in the backward pass, or, in a weighted sum, give their gradient at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_MIB = 40.0  # fits the visual rows of two images in one chunk at V = 32,000, without recomputation
COLUMNS_AT_ONCE = 8192  # columns of a 16-bit head cast to float32 at a time

RowLoss = Callable[[slice, Tensor], Tensor]  # slice of rows and its logits (n, V) -> (n,) losses, or (n, k)


@dataclass(frozen=True)
class Head:
    """Output head: hidden rows (N, d) -> logits (N, V) = rows W^T + b, soft-capped to cap tanh(logits / cap).

    Logits are float32 or wider. The cast applies to the operands, not the result: a bf16 product cast afterwards loses 4 to
    23% of a divergence's gradient (linkedin/Liger-Kernel issue 1432).
    """

    weight: Tensor  # (V, d); the embedding weight itself where the two are tied
    bias: Tensor | None = None  # (V,)
    cap: float | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        wide = at_least_float32(rows.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            if torch.is_grad_enabled():
                logits = F.linear(rows.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))
            else:
                logits = self.uncapped(rows)
        return self.capped(logits)

    def uncapped(self, rows: Tensor) -> Tensor:
        """Logits rows W^T + b before the soft cap, float32 or wider, without a gradient."""
        wide = at_least_float32(rows.dtype)
        if self.weight.dtype == wide:
            return F.linear(rows.to(wide), self.weight, self.bias)
        if rows.is_cuda and rows.dtype == self.weight.dtype:  # equal to casting the operands, at twice the rate of TF32
            logits = torch.mm(rows, self.weight.T, out_dtype=wide)
        else:
            rows = rows.to(wide)
            logits = rows.new_empty(len(rows), len(self.weight))
            for columns, weight in self.widened(wide):
                torch.mm(rows, weight.T, out=logits[:, columns])
        return logits if self.bias is None else logits.add_(self.bias)

    def widened(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the weight in `dtype`: a full copy would be larger than any chunk of logits."""
        step = len(self.weight) if self.weight.dtype == dtype else COLUMNS_AT_ONCE
        for start in range(0, len(self.weight), step):
            columns = slice(start, start + step)
            yield columns, self.weight[columns].to(dtype)

    def gram(self, columns: int | None, centred: bool = False) -> Tensor:
        """Gram matrix of the logits over the first `columns`: their inner products are h gram h'^T.

        (d, d); with a bias (d + 1, d + 1), of [W, b], for [h, 1].

        `centred`: for logits minus their mean over the vocabulary. Raises ValueError if logits are soft-capped.
        """
        if self.cap is not None:
            raise ValueError("a head with soft-capped logits (Gemma 2) is not linear, and has no Gram matrix")
        weight = self.weight[:columns].to(at_least_float32(self.weight.dtype))
        augmented = weight if self.bias is None else torch.cat([weight, self.bias[:columns, None].to(weight.dtype)], dim=1)
        if centred:
            augmented = augmented - augmented.mean(0)
        with torch.autocast(weight.device.type, enabled=False):
            return augmented.T @ augmented

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def rows_per_chunk(columns: int, chunk_mib: float) -> int:
    """Chunk size in rows: float32 logits over `columns` take at most `chunk_mib` MiB; at least one row."""
    return max(1, int(chunk_mib * 2**20) // (4 * columns))


def row_losses(rows: Tensor, head: Head, loss: RowLoss, size: int, weights: Tensor | None = None) -> Tensor:
    """(N,) losses of hidden rows (N, d) through `head`, in chunks of `size` rows; with `weights` (N,), their weighted sum ().

    Gradients flow to the rows and the head, none to `weights`. A single chunk keeps its logits for the backward pass; several
    recompute theirs, since the upstream gradient per row is known only then. That of a weighted sum is one scalar, so each
    chunk's gradient is computed along with its value, without recomputation; memory: buffers of the size of the rows and of
    the head.
    """
    inputs, chunked = (rows, head.weight, head.bias, head.cap, loss), len(rows) > size
    if chunked and weights is not None and torch.is_grad_enabled():
        weighted_sum: Tensor = _Weighted.apply(*inputs, weights, size)
        return weighted_sum
    losses: Tensor = _Chunks.apply(*inputs, size) if chunked else loss(slice(None), head(rows))
    return losses if weights is None else (weights.detach() * losses).sum()


def cross_entropy(rows: Tensor, head: Head, targets: Tensor, chunk_mib: float = CHUNK_MIB) -> Tensor:
    """() cross-entropy of hidden rows (N, d) against (N,) target tokens, summed, in nats."""
    size = rows_per_chunk(len(head.weight), chunk_mib)
    if head.cap is not None or len(rows) <= size:
        return row_losses(
            rows, head, lambda chunk, logits: F.cross_entropy(logits, targets[chunk], reduction="none"), size
        ).sum()
    wide = at_least_float32(rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        return F.linear_cross_entropy(
            rows.to(wide),
            head.weight.to(wide),
            targets,
            linear_bias=None if head.bias is None else head.bias.to(wide),
            reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size),
        )


class _Chunks(torch.autograd.Function):
    """Autograd function of `row_losses` for more than one chunk. Against torch.utils.checkpoint per chunk it saves one
    gradient of the head's size: chunks accumulate into one buffer instead of leaving autograd to sum theirs."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, loss: RowLoss, size: int
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias)
        ctx.cap, ctx.loss, ctx.size = cap, loss, size
        head = Head(weight, bias, cap)
        return torch.cat([loss(chunk, head(rows[chunk])) for chunk in _slices(len(rows), size)])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias = ctx.saved_tensors
        _, gradients = _chunked_gradients(rows, Head(weight, bias, ctx.cap), ctx.loss, upstream, ctx.size, ctx.needs_input_grad)
        return *_cast_gradients(gradients, (rows, weight, bias)), None, None, None


class _Weighted(torch.autograd.Function):
    """Autograd function of weighted `row_losses`; gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cap: float | None,
        loss: RowLoss,
        weights: Tensor,
        size: int,
    ) -> Tensor:
        weighted_sum, gradients = _chunked_gradients(rows, Head(weight, bias, cap), loss, weights, size, ctx.needs_input_grad)
        ctx.save_for_backward(rows, weight, bias)
        ctx.gradients = gradients
        return weighted_sum

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # raises on a second backward pass: the gradients are released below
        scaled = [None if gradient is None else gradient.mul_(upstream) for gradient in ctx.gradients]
        del ctx.gradients
        return *_cast_gradients(scaled, inputs), None, None, None, None


def _chunked_gradients(
    rows: Tensor, head: Head, loss: RowLoss, upstream: Tensor, size: int, needs_grad: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """() sum of `upstream` (N,) x losses, and its gradients to rows, weight and bias where `needs_grad`, float32 or wider."""
    wide = at_least_float32(rows.dtype)
    inputs = (rows, head.weight, head.bias)
    gradients = [
        torch.zeros_like(x, dtype=wide) if needed and x is not None else None
        for x, needed in zip(inputs, needs_grad, strict=False)
    ]
    rows_grad, weight_grad, bias_grad = gradients
    weighted_sum = upstream.new_zeros((), dtype=wide)
    with torch.autocast(rows.device.type, enabled=False):
        for chunk in _slices(len(rows), size):
            logits = head.uncapped(rows[chunk]).requires_grad_(any(needs_grad[:3]))
            with torch.set_grad_enabled(logits.requires_grad):
                weighted = (upstream[chunk] * loss(chunk, head.capped(logits))).sum()
            weighted_sum += weighted.detach()
            if not logits.requires_grad:
                continue
            (gradient,) = torch.autograd.grad(weighted, logits)
            del logits
            if rows_grad is not None:
                for columns, head_weight in head.widened(wide):
                    rows_grad[chunk].addmm_(gradient[:, columns], head_weight)
            if weight_grad is not None:
                weight_grad.addmm_(gradient.T, rows[chunk].to(wide))
            if bias_grad is not None:
                bias_grad += gradient.sum(0)
    return weighted_sum, gradients


def _cast_gradients(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Casts each gradient to its parameter's dtype."""
    pairs = zip(gradients, inputs, strict=True)
    return [None if gradient is None or parameter is None else gradient.to(parameter.dtype) for gradient, parameter in pairs]


def _slices(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
