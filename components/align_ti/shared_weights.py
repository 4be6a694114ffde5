"""Deferred weight gradients: one gradient per weight for two passes over the same weights.

The ribbon continues over the plain pass, so a step uses each weight twice. By default autograd goes back through the ribbon
first: it materialises full-size weight gradients for the ribbon's few rows, holds them while the plain pass's activations are
still alive, and adds the plain pass's gradients weight by weight. Here the ribbon defers instead: it stores each layer's
inputs and output gradients, and the plain pass adds their product to its own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


class SharedWeights:
    """Context managers of the two passes: `shared.first` for the one whose backward comes last, `shared.second` for the other.

    Covers linear layers and embeddings; compiled code and frozen weights are unchanged. The loss must depend on the first
    pass's output, if only by zero times it: rows deferred by the second pass are dropped if the first pass has no backward.
    """

    first: AbstractContextManager[Any]
    second: AbstractContextManager[Any]

    def __init__(self, active: bool = True) -> None:
        slots: dict[int, _Slot] = {}
        self.first, self.second = (_Pass(slots, defers) if active else nullcontext() for defers in (False, True))


class _Slot:
    """Deferred rows of one weight, stored by the second pass for the first."""

    def __init__(self, parameter: Tensor, weight: Tensor) -> None:
        self.parameter = parameter  # reference that keeps the id, the slot's key, from being reused
        self.weight = weight  # weight used by both passes, cast once under autocast
        self._deferred: list[tuple[Tensor, Tensor]] = []
        self._closed = False

    def defer(self, gradients: Tensor, inputs: Tensor) -> bool:
        """Defer a pair of rows. False after the first pass's backward: the second then returns its own gradient."""
        if not self._closed:
            self._deferred.append((gradients, inputs))
        return not self._closed

    def fetch(self) -> list[tuple[Tensor, Tensor]]:
        self._closed = True
        deferred, self._deferred = self._deferred, []
        return deferred


class _Pass(TorchFunctionMode):
    """Function mode that replaces F.linear and F.embedding by the autograd functions below."""

    def __init__(self, slots: dict[int, _Slot], defers: bool) -> None:
        super().__init__()
        self._slots = slots
        self._defers = defers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if func is F.linear and not kwargs and args[1].requires_grad:
                return self._linear(*args)
            if func is F.embedding and args[1].requires_grad and not any(args[3:]) and not any(kwargs.values()):
                return _Embedding.apply(args[0], args[1], args[2] if len(args) > 2 else None, self._slot(args[1]), self._defers)
        return func(*args, **kwargs)

    def _linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.is_autocast_enabled(inputs.device.type):
            dtype = torch.get_autocast_dtype(inputs.device.type)
            inputs, bias = inputs.to(dtype), None if bias is None else bias.to(dtype)
        slot = self._slot(weight, inputs.dtype)
        out: Tensor = _Linear.apply(inputs, slot.weight, bias, slot, self._defers)
        return out

    def _slot(self, weight: Tensor, dtype: torch.dtype | None = None) -> _Slot:
        if id(weight) not in self._slots:
            self._slots[id(weight)] = _Slot(weight, weight if dtype is None else weight.to(dtype))
        return self._slots[id(weight)]


class _Linear(torch.autograd.Function):
    """F.linear with a deferred weight gradient: (..., a) inputs, (b, a) weight -> (..., b)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, slot: _Slot, defers: bool) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.slot, ctx.defers = slot, defers
        return F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows, gradients = inputs.flatten(0, -2), upstream.flatten(0, -2)
        weight_gradient = None
        if needs_weight and not (ctx.defers and ctx.slot.defer(gradients, rows)):
            weight_gradient = gradients.T @ rows
            for more_gradients, more_rows in [] if ctx.defers else ctx.slot.fetch():
                weight_gradient.addmm_(more_gradients.T, more_rows)
        return (
            upstream @ weight if needs_inputs else None,
            weight_gradient,
            gradients.sum(0) if needs_bias else None,
            None,
            None,
        )


class _Embedding(torch.autograd.Function):
    """F.embedding with a deferred weight gradient: (...) tokens, (V, d) weight -> (..., d)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding: int | None, slot: _Slot, defers: bool) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.columns, ctx.padding, ctx.slot, ctx.defers = len(weight), -1 if padding is None else padding, slot, defers
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        rows, gradients = tokens.flatten(), upstream.flatten(0, -2)
        if ctx.defers and ctx.slot.defer(gradients, rows):
            return None, None, None, None, None
        pairs = [(gradients, rows), *([] if ctx.defers else ctx.slot.fetch())]
        all_gradients, all_rows = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        weight_gradient = torch.ops.aten.embedding_dense_backward(all_gradients, all_rows, ctx.columns, ctx.padding, False)
        return None, weight_gradient, None, None, None
